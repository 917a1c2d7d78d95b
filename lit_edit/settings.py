"""Objects that know their settings: for checkpoints that refuse another method, for reports, and as their text."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Self

KIND = "class"


class Configured:
    """Remembers the arguments it was created with, defaults included."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Notes the arguments; those that do not fit are left to ``__init__`` to refuse."""
        made = super().__new__(cls)
        if cls.__init__ is object.__init__:
            return made
        try:
            bound = inspect.signature(cls.__init__).bind(made, *args, **kwargs)
        except TypeError:  # also a copy, which takes over what the copied object notes
            return made
        bound.apply_defaults()
        made.__dict__["_arguments"] = {name: value for i, (name, value) in enumerate(bound.arguments.items()) if i}
        return made

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments by name."""
        return dict(self.__dict__.get("_arguments", {}))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


def settings_of(value: Any) -> Any:
    """Settings as plain types that JSON and checkpoints can hold.

    Args:
        value: A `Configured` object or a dataclass, which become mappings with the name of their class; or something
            plain. Anything else stands by its type's name.

    Example:
        >>> settings_of([1, "a", None])
        [1, 'a', None]
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Configured):
        return {KIND: type(value).__name__, **{name: settings_of(item) for name, item in value.arguments.items()}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {KIND: type(value).__name__, **{name: settings_of(item) for name, item in fields.items()}}
    if isinstance(value, Mapping):
        return {str(name): settings_of(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [settings_of(item) for item in value]
    return type(value).__name__


def first_difference(there: Any, here: Any, name: str = "") -> str | None:
    """Where two results of `settings_of` differ first, in words; None if they are equal.

    Args:
        there: Of a checkpoint.
        here: Of this run.
        name: What they are settings of.

    Example:
        >>> first_difference({"values": {"lr": 0.5}}, {"values": {"lr": 0.1}})
        'values.lr is 0.5 there and 0.1 here'
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping) and there.get(KIND) == here.get(KIND):
        for key in [*there, *(key for key in here if key not in there)]:
            inner = f"{name}.{key}" if name else str(key)
            if key not in there or key not in here:
                return f"{inner} is set {'there' if key in there else 'here'} only"
            if found := first_difference(there[key], here[key], inner):
                return found
        return None
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for i, (one, other) in enumerate(zip(there, here, strict=True)):
            if found := first_difference(one, other, f"{name}[{i}]"):
                return found
        return None
    if there == here:
        return None
    return f"{name} is {_shown(there)} there and {_shown(here)} here"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping) and KIND in value:
        return str(value[KIND])
    return repr(value)
