"""What the documents say of settings, files and dependencies is so."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lit_edit.configs.find import read_config

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.yaml"))
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
CELL = re.compile(r"`([^`]*)`")


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every table row."""
    for line in text.splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def settings(part: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a part by dotted name: a class, or a list of them, by name, everything else by its value."""
    if path:
        yield path, part["class_path"].rsplit(".", 1)[1]
    for name, value in part.get("init_args", {}).items():
        below = f"{path}.{name}" if path else name
        if isinstance(value, dict):
            yield from settings(value, below)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            names = [item["class_path"].rsplit(".", 1)[1] for item in value]
            yield below, names
            for kind, item in zip(names, value, strict=True):
                yield from (row for row in settings(item, f"{below}.{kind}") if row[0] != f"{below}.{kind}")
        else:
            yield below, value


@pytest.mark.parametrize("method", CONFIGS)
def test_a_card_states_every_setting_of_its_configuration(method: str) -> None:
    config = read_config(str(REPOSITORY / "configs" / f"{method}.yaml"))
    stated = {}
    for row in rows((REPOSITORY / "docs" / "methods" / f"{method}.md").read_text(encoding="utf-8")):
        name = CELL.fullmatch(row[0])
        if name:
            value = CELL.fullmatch(row[-1])
            assert value, row
            stated[name[1]] = yaml.safe_load(value[1])
    assert stated == dict(settings(config["model"]["editor"]))


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("part", ["Cost", "Constants", "Caveats", "Attribution"])
def test_a_card_has_its_parts(method: str, part: str) -> None:
    assert f"\n## {part}\n" in (REPOSITORY / "docs" / "methods" / f"{method}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in [*re.findall(r"\]\(([^)#]+)[^)]*\)", text), *re.findall(r'<img src="([^"]+)"', text)]:
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_classes_that_are_named_exist(document: Path) -> None:
    for name in CELL.findall(document.read_text(encoding="utf-8")):
        if re.fullmatch(r"(lit_edit|callbacks|datamodules|configs|tests|docs|benchmarks)/[\w/.-]*", name):
            assert (REPOSITORY / name).exists(), name
        elif re.fullmatch(r"lit_edit(\.\w+)*\.[A-Z]\w+", name):
            module, member = name.rsplit(".", 1)
            assert hasattr(__import__(module, fromlist=[member]), member), name


def rooms() -> list[str]:
    """The rooms of the tree in docs/architecture.md, from the top down."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"```text\n(.*?)```", text, flags=re.DOTALL)
    assert block
    return [line.split()[0].rstrip("/") for line in block[1].splitlines()]


def imports() -> dict[str, set[str]]:
    """For every room (a module of lit_edit, or a folder) the rooms that it imports anywhere."""
    files = {path: path.relative_to(REPOSITORY).parts[1:] for path in (REPOSITORY / "lit_edit").rglob("*.py")}
    for folder in ("callbacks", "datamodules", "configs"):
        files |= {path: path.relative_to(REPOSITORY).parts for path in (REPOSITORY / folder).rglob("*.py")}
    found: dict[str, set[str]] = {}
    for path, names in files.items():
        room = names[0].removesuffix(".py")
        if room == "__init__":
            continue
        used = found.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                module = (node.module or "").split(".")
                if module == ["lit_edit"]:
                    used |= {alias.name for alias in node.names}
                elif module[0] == "lit_edit":
                    used.add(module[1])
            elif isinstance(node, ast.Import):
                used |= {n.name.split(".")[1] for n in node.names if n.name.startswith("lit_edit.")}
        used.discard(room)
    return found


def test_the_tree_has_every_room() -> None:
    assert set(rooms()) == set(imports())


def test_rooms_import_only_rooms_below() -> None:
    order, found = rooms(), imports()
    assert sum(map(len, found.values())) > 40  # the imports are seen
    wrong = {f"{room} imports {o}" for room in found for o in found[room] if order.index(o) <= order.index(room)}
    assert wrong == set()
