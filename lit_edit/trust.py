"""Classes that a configuration names: those of other packages are created only with the user's consent.

A configuration can name any importable class, and creating one runs its code. Configurations get passed around, so what
is not from `TRUSTED` is named to the user first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jsonargparse import set_parsing_settings

TRUSTED = ("lit_edit", "lightning", "torch")
_KEY = "class_path"


def enforce(allowed: Collection[str]) -> None:
    """Has jsonargparse import nothing else for the rest of the process, and create nothing in slots without a type.

    Args:
        allowed: Modules, packages or classes by their dotted names, beside `TRUSTED`.

    Raises:
        ValueError: If one of them is no such name.
    """
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*TRUSTED, *allowed],
        instantiate_subclass_spec_in_any=False,
    )


def named_classes(config: Any) -> Iterator[str]:
    """Every ``class_path`` in a nested configuration, each container once however often YAML aliases repeat it."""
    seen: set[int] = set()
    left = [config]
    while left:
        value = left.pop()
        if not isinstance(value, Mapping | list | tuple) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            if isinstance(value.get(_KEY), str):
                yield value[_KEY]
            left += value.values()
        else:
            left += value


def check_classes(config: Any, allowed: Collection[str], where: str) -> None:
    """Refuses classes from outside `TRUSTED` and what the user allows. To be asked before any is imported.

    Args:
        config: Nested mappings and lists. A class named without a dot is one that the program knows already.
        allowed: Modules, packages or classes by their dotted names.
        where: The configuration, for the message.

    Raises:
        ValueError: Naming the class and the option that allows it.
    """
    for name in named_classes(config):
        if "." not in name or any(name == one or name.startswith(f"{one}.") for one in (*TRUSTED, *allowed)):
            continue
        raise ValueError(refusal(name, where))


def refusal(name: str, where: str) -> str:
    """What is said about a class that was not created."""
    return (
        f"{where} names the class {name!r}, from outside {', '.join(TRUSTED[:-1])} and {TRUSTED[-1]}. Creating it runs "
        f"its code. If you trust it, add --trust={name.split('.')[0]}."
    )
