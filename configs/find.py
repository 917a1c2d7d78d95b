"""Configurations by name: a file, or one of those that come with the package."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import yaml


def config_folder() -> Path:
    """The folder of the configurations that come with the package."""
    with as_file(files("lit_edit.configs").joinpath("mose.yaml")) as path:
        return path.parent


def find_config(name: str) -> str:
    """A file as it is named, or else of that name in the package's configurations, with or without ``.yaml``.

    Those for real models lie in a folder: ``models/llama3-8b/memit``.

    Raises:
        ValueError: if there is neither; the message lists what there is in that folder.
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
    raise ValueError(
        f"There is no configuration {name!r}, neither here nor among those that come along: {', '.join(sorted(known))}."
    )


def read_config(name: str) -> dict[str, Any]:
    """The content of a configuration.

    Raises:
        ValueError: if there is none, or it is not a mapping in YAML.
    """
    path = find_config(name)
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a mapping is needed, such as `model:` with its settings below.")
    return content
