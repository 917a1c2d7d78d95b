"""What the runs of a comparison measured, side by side: means and spreads over seeds, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_edit.commands.compare.runs import EDITS, Run
from lit_edit.runs.results import read_results

#: Quantities of a table, in its order, and their headings.
QUANTITIES = {
    "reliability": "reliability",
    "generalization": "generalization",
    "locality": "locality",
    "general_abilities": "general abilities",
    "norm": "norm",
    "condition_number": "condition number",
    "drift": "drift",
}
STAGES = ("layers", "values", "keys", "solve", "restrain", "write", "score", "other")

_SOURCES = {
    "stability/mean_frobenius_norm": "norm",
    "stability/worst_condition_number": "condition_number",
    "stability/mean_relative_drift": "drift",
}

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Measured:
    """One complete run.

    Args:
        run: what was asked for.
        about: the run record of its results.
        curve: figures by quantity at every count of edits that was measured.
        seconds: mean seconds of an edit by stage, and their sum as ``total``.
        edits: what was edited, in order: case, prompt and target.
    """

    run: Run
    about: dict[str, Any]
    curve: dict[int, Figures]
    seconds: dict[str, float]
    edits: list[tuple[str, str, str]]

    def at(self, count: int) -> Figures:
        """The figures at the first measurement from ``count`` on: batches may step over the count itself.

        Every quantity on its own, since each may be measured at other counts.
        """
        found: Figures = {}
        for edits in sorted(self.curve):
            if edits >= count:
                for quantity, value in self.curve[edits].items():
                    found.setdefault(quantity, value)
        return found


def measured(run: Run) -> Measured:
    """Reads what a complete run left."""
    results = read_results(run.folder)
    lines = (run.folder / EDITS).read_text(encoding="utf-8").splitlines()
    edits = [json.loads(line) for line in lines if line.strip()]
    seconds = {"total": sum(e["seconds"] for e in edits) / len(edits)} if edits else {}
    for stage in dict.fromkeys(stage for e in edits for stage in e.get("stages", {})):
        seconds[stage] = sum(e["stages"].get(stage, 0.0) for e in edits) / len(edits)
    return Measured(
        run,
        results.run,
        {record["edits"]: quantities(record) for record in results.records},
        seconds,
        [(e["case_id"], e["prompt"], e["target_new"]) for e in edits],
    )


def quantities(record: Mapping[str, Any]) -> Figures:
    """The figures of a record of ``results.json`` by their names in tables; general abilities as the tasks' mean."""
    found: Figures = {}
    for key, value in record.items():
        if key in QUANTITIES or key in _SOURCES:
            found[_SOURCES.get(key, key)] = value
    scores = [value for key, value in record.items() if key.startswith("downstream/")]
    if scores:
        found["general_abilities"] = None if None in scores else sum(scores) / len(scores)
    return found


def check_same_edits(runs: Iterable[Measured]) -> None:
    """Refuses to compare runs that did not edit the same.

    Raises:
        ValueError: naming two runs and the first edit in which they differ.
    """
    first: dict[int, Measured] = {}
    for one in runs:
        other = first.setdefault(one.run.seed, one)
        for number, (mine, theirs) in enumerate(zip(one.edits, other.edits, strict=False), start=1):
            if mine != theirs:
                raise ValueError(
                    f"{one.run.name} and {other.run.name} did not make the same edits with seed {one.run.seed}: edit "
                    f"{number} is case {mine[0]!r} of the one and {theirs[0]!r} of the other. Give all the same --data."
                )


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: its values, those that are not finite as None."""

    values: tuple[float | None, ...]

    @property
    def mean(self) -> float | None:
        """None if any seed's is not finite."""
        known = [value for value in self.values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(self.values) else None

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """Smallest and largest finite value."""
        known = [value for value in self.values if value is not None]
        return (min(known), max(known)) if known else (None, None)

    def __str__(self) -> str:
        """Mean, and smallest and largest where they are others."""
        if not self.values:
            return "-"
        low, high = map(shown, self.bounds)
        return shown(self.mean) if low == high else f"{shown(self.mean)} ({low} to {high})"

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        low, high = self.bounds
        return {"mean": self.mean, "min": low, "max": high, "values": list(self.values)}


def shown(value: float | None) -> str:
    """Three digits; "n/a" for what is not finite."""
    return "n/a" if value is None else f"{value:.3g}"


class Comparison:
    """The runs of a comparison, ordered by method.

    Args:
        runs: all that were asked for, at least one.
        complete: what those that are complete measured.

    Raises:
        ValueError: if two runs did not make the same edits.
    """

    def __init__(self, runs: Sequence[Run], complete: Sequence[Measured]) -> None:
        check_same_edits(complete)
        self.at, self.n_edits = runs[0].at, runs[0].n_edits
        self.seeds = list(dict.fromkeys(run.seed for run in runs))
        self.methods = {run.name: [m for m in complete if m.run.name == run.name] for run in runs}

    @property
    def failed(self) -> dict[str, int]:
        """Per method, how many seeds have no complete run."""
        missing = {name: len(self.seeds) - len(complete) for name, complete in self.methods.items()}
        return {name: number for name, number in missing.items() if number}

    def spread(self, name: str, of: Callable[[Measured], Mapping[str, float | None]], key: str) -> Spread:
        """One figure of a method over its seeds."""
        return Spread(tuple(figures[key] for figures in map(of, self.methods[name]) if key in figures))

    def point(self, name: str, count: int, quantity: str) -> Spread:
        """A quantity at an evaluation point."""
        return self.spread(name, lambda m: m.at(count), quantity)

    def seconds(self, name: str, stage: str) -> Spread:
        """Seconds of an edit."""
        return self.spread(name, lambda m: m.seconds, stage)

    def method(self, name: str) -> str:
        """What the method is, in words, as its first complete run says."""
        found = self.methods[name]
        return str(found[0].about.get("method", "")) if found else ""

    def curve(self, name: str, quantity: str) -> dict[int, Spread]:
        """A quantity at every count that was measured with every seed."""
        curves = [
            {edits: figures[quantity] for edits, figures in m.curve.items() if quantity in figures}
            for m in self.methods[name]
        ]
        counts = sorted(set.intersection(*map(set, curves))) if curves else []
        return {count: Spread(tuple(curve[count] for curve in curves)) for count in counts}

    def _before(self, quantity: str) -> Spread:
        """A quantity of the unedited model, over all runs: methods watch the weights that they may edit."""
        starts = [m.curve.get(0, {}) for complete in self.methods.values() for m in complete]
        return Spread(tuple(figures[quantity] for figures in starts if quantity in figures))

    def _label(self, name: str) -> str:
        missing = self.failed.get(name, 0)
        if not missing or missing == len(self.seeds):
            return name
        return f"{name} ({missing} of {len(self.seeds)} seeds failed)"

    def stages(self) -> list[str]:
        """The stages that occur, in the usual order."""
        found = {stage for complete in self.methods.values() for m in complete for stage in m.seconds} - {"total"}
        return [*(s for s in STAGES if s in found), *sorted(found - set(STAGES))]

    def markdown(self) -> str:
        """The tables: one for every evaluation point, then seconds by stage."""
        lines = [f"# {self.n_edits} edits, {len(self.methods)} methods", "", *self._preamble(), ""]
        present = [q for q in QUANTITIES if any(self.point(n, c, q).values for n in self.methods for c in self.at)]
        for count in self.at:
            lines += [f"## After {count} edits", "", *_table(["", *(QUANTITIES[q] for q in present)])]
            lines.append(_row("before", [str(self._before(q)) for q in present]))
            for name in self.methods:
                cells = [str(self.point(name, count, q)) if self.methods[name] else "failed" for q in present]
                lines.append(_row(self._label(name), cells))
            lines.append("")
        stages = self.stages()
        lines += ["## Seconds per edit, by stage", "", *_table(["", "method", "total", *stages])]
        for name in self.methods:
            cells = [_seconds(self.seconds(name, s)) if self.methods[name] else "failed" for s in ("total", *stages)]
            lines.append(_row(self._label(name), [self.method(name), *cells]))
        return "\n".join(lines) + "\n"

    def _preamble(self) -> list[str]:
        seeds = f"Seed {self.seeds[0]}" if len(self.seeds) == 1 else f"Seeds {', '.join(map(str, self.seeds))}"
        over = "." if len(self.seeds) == 1 else ": mean (smallest to largest)."
        lines = [
            f"{seeds}{over} Retention over all edits so far, by exact match;",
            "locality against the unedited model; the mean of the general abilities; mean norm, worst condition number",
            "and mean drift of the weights that a method may edit.",
        ]
        complete = [m.about for found in self.methods.values() for m in found]
        named = {"model": "Model", "data": "data", "device": "device", "threads": "CPU threads per run"}
        said = []
        for key, words in named.items():
            values = dict.fromkeys(str(about[key]) for about in complete if about.get(key) is not None)
            if values:
                said.append(f"{words}: {', '.join(values)}")
        return [*lines, "", "; ".join(said) + "."] if said else lines

    def tidy(self) -> str:
        """CSV with a row per method, seed and measurement; the seconds of the whole run in each of its rows."""
        stages = ["total", *self.stages()]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["name", "method", "seed", "edits", *QUANTITIES, *(f"seconds_{stage}" for stage in stages)])
        for name, complete in self.methods.items():
            for m in complete:
                seconds = [m.seconds.get(stage, "") for stage in stages]
                for edits, figures in sorted(m.curve.items()):
                    cells = ["" if figures.get(q) is None else figures[q] for q in QUANTITIES]
                    writer.writerow([name, m.about.get("method", ""), m.run.seed, edits, *cells, *seconds])
        return out.getvalue()

    def plain(self) -> dict[str, Any]:
        """Everything in the tables, for JSON; of every figure mean, smallest, largest and the values by seed."""
        return {
            "n_edits": self.n_edits,
            "at": list(self.at),
            "seeds": self.seeds,
            "methods": [
                {
                    "name": name,
                    "method": self.method(name),
                    "seeds": [m.run.seed for m in complete],
                    "failed_seeds": [s for s in self.seeds if s not in {m.run.seed for m in complete}],
                    "threads": [m.about.get("threads") for m in complete],
                    "points": {
                        str(count): {
                            q: spread.plain() for q in QUANTITIES if (spread := self.point(name, count, q)).values
                        }
                        for count in (0, *self.at)
                    },
                    "seconds_per_edit": {
                        s: self.seconds(name, s).plain() for s in ("total", *self.stages()) if complete
                    },
                }
                for name, complete in self.methods.items()
            ],
        }


def _seconds(spread: Spread) -> str:
    """Milliseconds are enough, and the spread is in the JSON file."""
    return "-" if spread.mean is None else f"{spread.mean:.3f}"


def _table(headings: Sequence[str]) -> list[str]:
    return [_row(headings[0], headings[1:]), "|---" * len(headings) + "|"]


def _row(label: str, cells: Iterable[str]) -> str:
    return "| " + " | ".join([label, *cells]) + " |"
