"""`train.py report`: a page about runs, its tables, and errors in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.reports import write_run

from lit_edit.cli import main

Said = pytest.CaptureFixture[str]


def test_a_run_gets_its_page_beside_its_results(tmp_path: Path, capsys: Said) -> None:
    folder = write_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert capsys.readouterr().out == f"Report: {folder / 'report.html'} ({_size(folder / 'report.html')})\n"


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1000:.3g} kB"


def test_several_runs_get_one_page_and_tables(tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (0, 1):
        write_run(tmp_path / f"run{number}", seed=number)
    assert main(["report", "run0", "run1", "--tables", "--at", "4", "12", "--names", "ours", "theirs"]) == 0
    assert "ours, theirs: compared" in Path("report.html").read_text(encoding="utf-8")
    rows = Path("report-tables.md").read_text(encoding="utf-8").splitlines()
    assert [row.split(" | ")[0] for row in rows] == ["| method", "| ---", "| ours", "| theirs"]
    assert "12 edits" in Path("report-tables.tex").read_text(encoding="utf-8")
    assert capsys.readouterr().out.splitlines()[1:] == ["Table: report-tables.md", "Table: report-tables.tex"]


def test_what_is_missing_is_said(tmp_path: Path, capsys: Said) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "outcomes.jsonl").unlink()
    assert main(["report", str(folder), "--out", str(tmp_path / "new" / "page.html")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("memit: outcomes.jsonl is missing (--retention.outcomes=false?)")
    assert (tmp_path / "new" / "page.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nowhere"], "nowhere is no folder of a run"),
        ([], "report: the following arguments are required: runs"),
        (["run", "--at", "5"], "No run was judged after 5 edits; there are 4, 8, 12."),
        (["run", "--names", "a", "b"], "1 runs need as many different names, not a, b."),
        (["broken"], "is not JSON"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{", encoding="utf-8")
    assert main(["report", *arguments]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert error in said
    assert not (tmp_path / "report.html").exists()
