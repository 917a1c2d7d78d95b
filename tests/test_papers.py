"""docs/papers.md names every table and figure of the papers, and commands that exist."""

from __future__ import annotations

import itertools
import re
import shlex
import warnings
from pathlib import Path

import pytest
from lit_edit.configs.find import find_config

from lit_edit.cli import _resolve, _Unstarted

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "papers.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(span)[1:] for span in re.findall(r"`(train\.py [^`]*)`", TEXT) if "RUN" not in span]
# Tables and figures by paper, as their captions number them.
NUMBERED = {"MOSE": (10, 22), "O-Edit": (10, 8), "EAC": (4, 13), "PRUNE": (6, 16)}
MISSING = {("O-Edit", "Table", 4)}  # its text has none


def named(section: str, kind: str) -> set[int]:
    """The numbers after ``Table``, ``Tables``, ``Fig.``, ranges and enumerations included."""
    found: set[int] = set()
    for row in [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")]:
        for numbers in re.findall(rf"{kind}s?\.? ((?:\d+(?:-\d+)?(?: \([^)]*\))?(?:, (?=\d))?)+)", row):
            for first, last in re.findall(r"(\d+)(?:-(\d+))?", re.sub(r"\([^)]*\)", "", numbers)):
                found |= set(range(int(first), int(last or first) + 1))
    return found


@pytest.mark.parametrize("paper", NUMBERED)
def test_every_table_and_figure_has_a_row(paper: str) -> None:
    section = next(part for part in TEXT.split("\n## ") if part.startswith(f"{paper}:"))
    for kind, last in zip(("Table", "Fig"), NUMBERED[paper], strict=True):
        wanted = {n for n in range(1, last + 1) if (paper, kind, n) not in MISSING}
        assert named(section, kind) == wanted, kind


def test_no_row_is_left_without_a_result_or_a_reason() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ")]
    assert len(rows) > 50
    assert all(len(row.split(" | ")) == 3 and row.split(" | ")[2].strip(" |") for row in rows)
    assert "{" not in TEXT


def test_comparisons_name_configurations_that_exist() -> None:
    compared = [words for words in COMMANDS if words[0] == "compare"]
    assert len(compared) > 10
    for words in compared:
        after = words[words.index("--configs") + 1 :]
        names = list(itertools.takewhile(lambda word: not word.startswith("--"), after))
        assert names, words
        for name in names:
            for part in name.split("+"):
                find_config(part)


def test_single_runs_name_settings_that_exist() -> None:
    fits = [["fit", *words[1:]] for words in COMMANDS if words[0] in ("fit", "single")]
    assert len(fits) > 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = _Unstarted(["fit", "--config", "ft.yaml", "--trainer.logger=false", "--downstream=null"])
        for words in fits:
            resolved, _ = _resolve(words, [])
            assert made.parser.parse_args(resolved).fit.model.editor.class_path, words
