"""``python train.py report``: one page about a run, or about several side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lit_edit.commands.options import Parser
from lit_edit.runs.report import FILE_NAME, write_report
from lit_edit.units import size_text

SUMMARY = "Write a page about a run, or about several side by side."

_DESCRIPTION = """\
Writes one self-contained HTML page about one or several runs: what became of every edit, the figures with their 95 %
intervals, curves, seconds by stage, settings. Several runs are compared edit by edit. The page loads nothing from
elsewhere; what a run did not leave is named in it."""

_EPILOG = """\
A folder with runs below it, as `compare` leaves it, stands for all of them. --tables also writes the papers' table
(methods by counts of edits, with intervals) beside report.html: report-tables.md and report-tables.tex.

  python train.py report runs/mose/version_0
  python train.py report runs/mose/version_0 runs/memit/version_0 --out report.html --tables --at 50 100
  python train.py report runs/compare --out compare.html"""


def parser() -> Parser:
    """The options of ``report``."""
    options = Parser("report", _DESCRIPTION, _EPILOG)
    options.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or with runs below it")
    options.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"where the page goes (default: {FILE_NAME} in the folder of the run, or here for several)",
    )
    options.add_argument("--names", nargs="+", metavar="NAME", help="what to call the runs, a name for each")
    options.add_argument("--tables", action="store_true", help="write the papers' table as Markdown and LaTeX, too")
    options.add_argument(
        "--at",
        nargs="+",
        type=int,
        metavar="N",
        help="counts of edits in the papers' table (default: quarters of the last count)",
    )
    return options


def main(args: Sequence[str] | None = None) -> int:
    """Writes the page. Returns 0.

    Args:
        args: The options, without the word ``report``; those of the process after it if None.

    Raises:
        ValueError: If a folder holds no run, or names or counts do not fit the runs.
    """
    given = parser().parse_args(list(sys.argv[2:] if args is None else args))
    places = [place.expanduser() for place in given.runs]
    default = places[0] if len(places) == 1 else Path()
    out = (given.out or default / FILE_NAME).expanduser()
    written = write_report(places, out, at=given.at, names=given.names, tables=given.tables)
    for label, missing in written.missing.items():
        for what in missing:
            print(f"{label}: {what}")
    print(f"Report: {written.page} ({size_text(written.page.stat().st_size)})")
    for path in written.tables:
        print(f"Table: {path}")
    return 0
