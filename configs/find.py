"""Configurations by name: a file, or one of those that come with the package; what they are laid over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import yaml

from lit_edit.spelling import did_you_mean

BASE = "base"
"""Key of a configuration that is laid over another one: that one's name, or its place from this one's folder."""
_DEEPEST = 8  # configurations over one another


def config_folder() -> Path:
    """The folder of the configurations that come with the package."""
    with as_file(files("lit_edit.configs").joinpath("mose.yaml")) as path:
        return path.parent


def find_config(name: str) -> str:
    """A file as it is named, or else of that name in the package's configurations, with or without ``.yaml``.

    Those for real models lie in a folder: ``models/llama3-8b/memit``.

    Raises:
        ValueError: If there is neither; the message lists what there is in that folder.
    """
    if Path(name).is_file():
        return name
    folder = config_folder()
    for candidate in (folder / name, folder / f"{name}.yaml"):
        if candidate.is_file():
            return str(candidate)
    folder = folder.resolve()
    parents = (folder / name).resolve().parents
    near = next((p for p in parents if p.is_dir() and p.is_relative_to(folder)), folder)
    known = [str(p.relative_to(folder)) for p in near.glob("*.yaml")]
    known += [f"{p.relative_to(folder)}/" for p in near.iterdir() if any(p.glob("*.yaml"))]
    meant = did_you_mean(name.removesuffix(".yaml"), [one.removesuffix(".yaml") for one in known])
    raise ValueError(
        f"There is no configuration {name!r}{meant}, neither here nor among those that come along: "
        f"{', '.join(sorted(known))}."
    )


def read_config(name: str) -> dict[str, Any]:
    """The content of a configuration, laid over its base where it names one.

    Raises:
        ValueError: If there is none, or it is not a mapping in YAML.
    """
    found: dict[str, Any] = {}
    for content in _stack(Path(find_config(name))):
        found = laid_over(found, content)
    return found


def is_overlay(name: str) -> bool:
    """Whether a configuration is laid over another one."""
    return len(_stack(Path(find_config(name)))) > 1


def laid_over(base: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over others: mappings key by key, everything else as a whole.

    A class other than the base's takes none of its arguments.

    Example:
        >>> laid_over({"a": {"b": 1, "c": [2]}}, {"a": {"c": [3, 4]}})
        {'a': {'b': 1, 'c': [3, 4]}}
    """
    if content.get("class_path", base.get("class_path")) != base.get("class_path"):
        return dict(content)
    found = dict(base)
    for key, value in content.items():
        under = found.get(key)
        found[key] = laid_over(under, value) if isinstance(value, Mapping) and isinstance(under, Mapping) else value
    return found


def _stack(path: Path) -> list[dict[str, Any]]:
    """The contents of a configuration and its bases, the lowest first."""
    contents: list[dict[str, Any]] = []
    while len(contents) < _DEEPEST:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}: a mapping is needed, such as `model:` with its settings below.")
        base = content.pop(BASE, None)
        contents.insert(0, content)
        if base is None:
            return contents
        beside = path.parent / str(base)
        path = beside if beside.is_file() else Path(find_config(str(base)))
    raise ValueError(f"{path}: more than {_DEEPEST} configurations over one another; does one name itself as `{BASE}`?")


def check_order(names: Sequence[str]) -> None:
    """Refuses overlays that stand before the method they change, or alone.

    Args:
        names: The configurations of one run, in order; later ones are laid over earlier ones.

    Raises:
        ValueError: Naming the right order; and as `read_config`.
    """
    methods, changes = [], []
    for place, name in enumerate(names):
        editor = (read_config(name).get("model") or {}).get("editor") or {}
        if "class_path" in editor:
            methods.append(place)
        elif editor:
            changes.append(place)
    if changes and not methods:
        alone = names[changes[0]]
        method = Path(alone).stem
        known = (config_folder() / f"{method}.yaml").is_file()
        said = f"--config {method if known else 'memit'}.yaml --config {alone}"
        raise ValueError(f"{alone} only changes a method's settings: name the method before it, as in {said}.")
    if changes and changes[0] < methods[0]:
        early, method = names[changes[0]], names[methods[0]]
        raise ValueError(
            f"{early} changes settings of a method and stands before {method}, which would set them all again: "
            f"--config {method} --config {early}."
        )


def values_of(args: Sequence[str], *options: str) -> list[str]:
    """The values of an option of a command line, in order.

    Args:
        args: The command line.
        options: The names the option has.
    """
    found = []
    for arg, after in zip(args, [*args, None][1:], strict=True):
        name, equals, value = arg.partition("=")
        if name in options:
            found += [value] if equals else [] if after is None else [after]
    return found
