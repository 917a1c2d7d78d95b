"""``python train.py report``: one page about a run, or about several side by side."""

from __future__ import annotations

from pathlib import Path

from lit_edit.runs.report import FILE_NAME, write_report
from lit_edit.units import size_text

EXAMPLES = """\
  python train.py report runs/mose/version_0
  python train.py report runs/mose/version_0 runs/memit/version_0 --out report.html --tables --at 50 100
  python train.py report runs/compare --out compare.html"""


def report(
    runs: list[Path],
    /,
    out: Path | None = None,
    names: list[str] | None = None,
    tables: bool = False,
    at: list[int] | None = None,
) -> int:
    """Write a page about a run, or about several side by side.

    The page is one self-contained HTML file that loads nothing from elsewhere: what became of every edit, the figures
    with their 95 % intervals, curves, seconds by stage, settings. Several runs are compared edit by edit. What a run
    did not leave is named in it.

    Args:
        runs: Folders of runs, or folders with runs below them, as `compare` leaves them.
        out: Where the page goes (default: report.html in the folder of the run, or here for several).
        names: What to call the runs, a name for each.
        tables: Write the papers' table (methods by counts of edits, with intervals) as Markdown and LaTeX, too, beside
            the page: report-tables.md, report-tables.tex.
        at: Counts of edits in the papers' table (default: quarters of the last count).

    Raises:
        ValueError: If a folder holds no run, or names or counts do not fit the runs.
    """
    places = [place.expanduser() for place in runs]
    default = places[0] if len(places) == 1 else Path()
    written = write_report(places, (out or default / FILE_NAME).expanduser(), at=at, names=names, tables=tables)
    for label, missing in written.missing.items():
        for what in missing:
            print(f"{label}: {what}")
    print(f"Report: {written.page} ({size_text(written.page.stat().st_size)})")
    for path in written.tables:
        print(f"Table: {path}")
    return 0
