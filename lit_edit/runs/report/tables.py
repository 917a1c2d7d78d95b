"""The papers' tables: a method a row, a group of columns for every count of edits, as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .gather import RunData

COLUMNS = ("reliability", "generalization", "locality")
_PARTS = 4
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


@dataclass(frozen=True)
class PaperTable:
    """Methods by counts of edits.

    Attributes:
        counts: Counts of edits, ascending.
        rows: By label, a cell for every count and column: the figure and half the width of its 95 % interval.
    """

    counts: list[int]
    rows: dict[str, list[tuple[float | None, float | None]]]

    def markdown(self) -> str:
        """A table whose headings name count and figure."""
        headings = [f"{name} after {count}" for count in self.counts for name in COLUMNS]
        lines = [_row(["method", *headings]), _row(["---"] + ["---:"] * len(headings))]
        for label, cells in self.rows.items():
            plain = " ".join(label.split()).replace("\\", "\\\\").replace("|", "\\|")
            lines.append(_row([plain, *(_cell(*cell, " ± ") for cell in cells)]))
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """A ``tabular`` for the package booktabs."""
        width = len(COLUMNS)
        groups = [rf"\multicolumn{{{width}}}{{c}}{{{count:,} edits}}" for count in self.counts]
        starts = [2 + width * place for place in range(len(self.counts))]
        rules = " ".join(rf"\cmidrule(lr){{{start}-{start + width - 1}}}" for start in starts)
        lines = [
            rf"\begin{{tabular}}{{l{'r' * width * len(self.counts)}}}",
            r"\toprule",
            " & ".join(["", *groups]) + r" \\",
            rules,
            " & ".join(["method", *COLUMNS * len(self.counts)]) + r" \\",
            r"\midrule",
        ]
        for label, cells in self.rows.items():
            numbers = [_cell(value, half, r" \pm ") for value, half in cells]
            texts = [_latex(" ".join(label.split())), *("--" if text == "-" else f"${text}$" for text in numbers)]
            lines.append(" & ".join(texts) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def paper_table(runs: Sequence[RunData], at: Sequence[int] | None = None) -> PaperTable:
    """The table of some runs.

    Args:
        runs: A row each.
        at: Counts of edits; if None, the last that all runs were judged at, and those nearest to quarters of it.

    Raises:
        ValueError: If no run was judged at one of the counts.
    """
    judged = [{r["edits"] for r in run.records if r["edits"] and "reliability" in r} for run in runs]
    if at is None:
        counts = _quarters(set.intersection(*judged) or set.union(*judged)) if judged else []
    else:
        counts = sorted(set(at))
        known = set().union(*judged)
        unknown = [str(count) for count in counts if count not in known]
        if unknown:
            there = ", ".join(map(str, sorted(known))) or "none"
            raise ValueError(f"No run was judged after {', '.join(unknown)} edits; there are {there}.")
    rows = {}
    for run in runs:
        cells: list[tuple[float | None, float | None]] = []
        for count in counts:
            for key in COLUMNS:
                bounds = run.bounds(key, count)
                cells.append((run.figure(key, count), None if bounds is None else (bounds[1] - bounds[0]) / 2))
        rows[run.label] = cells
    return PaperTable(counts, rows)


def _quarters(counts: set[int]) -> list[int]:
    last = max(counts, default=0)
    wanted = [last * part / _PARTS for part in range(1, _PARTS + 1)]
    return sorted({min(counts, key=lambda count: (abs(count - want), count)) for want in wanted}) if counts else []


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: float | None, half: float | None, between: str) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if half is None else f"{value:.3f}{between}{half:.3f}"


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
