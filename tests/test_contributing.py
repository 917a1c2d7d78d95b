"""The diff in CONTRIBUTING.md is all that a new solver takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.runs import command_line

from lit_edit.cli import EditCLI
from lit_edit.editors import solvers

REPOSITORY = Path(__file__).resolve().parent.parent


def diff() -> dict[str, list[str]]:
    """The lines of every file of the diff."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"```diff\n(.*?)```", text, flags=re.DOTALL)
    assert block
    files: dict[str, list[str]] = {}
    for line in block[1].splitlines():
        if line.startswith("+++ b/"):
            lines = files.setdefault(line.removeprefix("+++ b/"), [])
        elif not line.startswith(("--- ", "@@ ")):
            lines.append(line)
    return files


def test_the_diff_fits_the_files_that_are_there() -> None:
    new = [path for path in diff() if not (REPOSITORY / path).exists()]
    assert new == ["lit_edit/editors/solvers/ridge.py", "configs/ridge.yaml"]
    for path, lines in diff().items():
        if path in new:
            assert all(line.startswith("+") for line in lines)
            continue
        there = "\n".join(line[1:] for line in lines if line.startswith(" "))
        assert there in (REPOSITORY / path).read_text(encoding="utf-8"), path
        assert sum(line.startswith("+") for line in lines) == 1


def test_a_solver_is_one_file_and_one_configuration(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, lines in diff().items():
        if not (REPOSITORY / path).exists():
            (tmp_path / Path(path).name).write_text("\n".join(line[1:] for line in lines) + "\n", encoding="utf-8")
    monkeypatch.setattr(solvers, "__path__", [*solvers.__path__, str(tmp_path)])
    given = command_line(tiny_folder("llama"), tmp_path, str(tmp_path / "ridge"))
    cli = EditCLI([*given, "--export.model=false", "--trainer.enable_progress_bar=false"])
    assert cli.model.editor.describe() == "Ridge"
    assert len(cli.model.journal) == 3
    assert all(change > 0 for edit in cli.model.journal for change in edit.change.values())
    session = cli.model.session
    assert session is not None
    assert all(site.covariance is None for site in session.sites)  # no statistics were collected for it
    site = next(site for site in session.sites if site.edited)
    keys, targets = torch.randn(site.shape[1], 2).double(), torch.randn(site.shape[0], 2).double()
    delta = cli.model.editor.solver.solve(site, keys, targets).delta(site.weight)  # type: ignore[attr-defined]
    missing = targets - site.exact @ keys
    gradient = (delta @ keys - missing) @ keys.T + 0.1 * delta
    assert float(gradient.abs().max()) < 1e-8
