"""What can be said in one line: errors of configuration without the machinery they come wrapped in."""

from __future__ import annotations

import inspect
import re
import sys

from lit_edit.spelling import did_you_mean, fit_options, unknown_option

# jsonargparse nests: the key, the class, the kinds of a union it tried in turn, and again the key within the class.
_KEY = re.compile(r'^Parser key "(?P<key>[^"]*)":\s*(?P<rest>.*)$')
_CLASS = re.compile(r"^Problem with given class_path '(?P<path>[^']*)':\s*(?P<rest>.*)$")
_OPTION = re.compile(r"^Option '(?P<option>[^']*)' is not accepted$")
_EXPECTED = re.compile(r"^Expected an? (?P<kind><class '[^']*'>|typing\.\S.*?)(?:\. Got value: (?P<value>.*))?$")
_NO_CLASS = re.compile(r"^Expected a dot import path string: (?P<name>.*)$")
_NO_ATTRIBUTE = re.compile(r"^module '(?P<module>[^']*)' has no attribute '(?P<name>[^']*)'$")
_GIVEN = re.compile(r"^Given value: (?P<value>.*)$")
_UNRECOGNIZED = re.compile(r"^unrecognized arguments: --(?P<name>[\w.]+)")
_NO_KEY = re.compile(r"does not accept option '(?P<key>[^']*)'")
_MACHINERY = re.compile(
    r"^(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Given value type: .*"
    r"|Expected a path but .*|Expected a <class 'NoneType'>)$"
)
_WRAPPED = ("Parser key ", "Does not validate against any of the Union subtypes")


def one_line(text: str) -> str:
    """The words of a text with single spaces between them."""
    return " ".join(text.split())


def readable(text: str) -> str:
    """An error message in one line: the key and the cause, where jsonargparse says much more.

    Args:
        text: the message; one that does not come from jsonargparse's nested checks is only brought into one line.

    Example:
        >>> readable('Parser key "model":\\n  Expected a <class \\'int\\'>. Got value: x')
        "model: expected int, got 'x'"
    """
    if not text.startswith(_WRAPPED):
        if found := _UNRECOGNIZED.match(text):
            return unknown_option(found["name"])
        return _with_key_meant(one_line(text))
    keys: list[str] = []
    causes: list[str] = []
    kinds: list[str] = []
    owner, given = "", ""
    for line in text.splitlines():
        rest = line.strip().removeprefix("- ")
        while rest:
            if found := _KEY.match(rest):
                keys.append(found["key"])
            elif found := _CLASS.match(rest):
                owner = found["path"]
            else:
                break
            rest = found["rest"]
        if not rest or _MACHINERY.match(rest):
            continue
        if found := _OPTION.match(rest):
            name = found["option"]
            causes.append(f"{owner} has no option {name!r}{did_you_mean(name, _arguments(owner))}")
        elif found := _EXPECTED.match(rest):
            kinds.append(re.sub(r"<class '([^']*)'>|typing\.", r"\1", found["kind"]))
            given = given or found["value"] or ""
        elif found := _NO_CLASS.match(rest):
            causes.append(f"there is no class {found['name']!r}{did_you_mean(found['name'], _classes())}")
        elif found := _NO_ATTRIBUTE.match(rest):
            meant = did_you_mean(found["name"], dir(sys.modules.get(found["module"])))
            causes.append(f"there is no {found['name']!r} in {found['module']}{meant}")
        elif found := _GIVEN.match(rest):
            # The innermost comes first; the outer ones repeat the whole section.
            given = given or found["value"]
        else:
            causes.append(rest)
    if not causes and kinds:
        causes.append(f"expected {' or '.join(kinds)}, got {given!r}")
    where = ".".join(keys)
    what = "; ".join(dict.fromkeys(map(one_line, causes))) or one_line(text)
    return f"{where}: {what}" if where else what


def _with_key_meant(text: str) -> str:
    """A message about a key of a configuration that does not exist, with the one that was meant."""
    found = _NO_KEY.search(text)
    if found is None:
        return text
    options = fit_options()
    group, _, name = found["key"].partition(".")
    meant = did_you_mean(name, options.get(group) or ()) if name else did_you_mean(group, options)
    return text.replace(found[0], found[0] + meant)


def _arguments(owner: str) -> list[str]:
    """The arguments of a class by its dotted name, which has been imported by whoever complains of it."""
    module, _, name = owner.rpartition(".")
    made = getattr(sys.modules.get(module), name, None)
    return [] if made is None else list(inspect.signature(made).parameters)


def _classes() -> set[str]:
    """The names of this package's classes, as far as it is imported."""
    modules = [module for name, module in sys.modules.items() if name.startswith("lit_edit.")]
    kinds = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return {kind.__name__ for kind in kinds if kind.__module__.startswith("lit_edit.") and kind.__name__[0] != "_"}
