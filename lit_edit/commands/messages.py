"""What can be said in one line: errors of configuration without the machinery they come wrapped in."""

from __future__ import annotations

import re

# jsonargparse nests: the key, the class, the kinds of a union it tried in turn, and again the key within the class.
_KEY = re.compile(r'^Parser key "(?P<key>[^"]*)":\s*(?P<rest>.*)$')
_CLASS = re.compile(r"^Problem with given class_path '(?P<path>[^']*)':\s*(?P<rest>.*)$")
_OPTION = re.compile(r"^Option '(?P<option>[^']*)' is not accepted$")
_EXPECTED = re.compile(r"^Expected an? (?P<kind><class '[^']*'>|typing\.\S.*?)(?:\. Got value: (?P<value>.*))?$")
_NO_CLASS = re.compile(r"^Expected a dot import path string: (?P<name>.*)$")
_GIVEN = re.compile(r"^Given value: (?P<value>.*)$")
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
        return one_line(text)
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
            causes.append(f"{owner} has no option {found['option']!r}")
        elif found := _EXPECTED.match(rest):
            kinds.append(re.sub(r"<class '([^']*)'>|typing\.", r"\1", found["kind"]))
            given = given or found["value"] or ""
        elif found := _NO_CLASS.match(rest):
            causes.append(f"there is no class {found['name']!r}")
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
