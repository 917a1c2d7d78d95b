"""What the runs of a comparison measured, side by side, as Markdown, CSV and JSON.

A figure of one run has the 95 % bootstrap interval over its requests, one over several seeds their mean and range.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from lit_edit.commands.compare.runs import Run
from lit_edit.runs.report.differences import Difference, common_count, difference
from lit_edit.runs.report.gather import RunData, read_run

#: Quantities of a table, in its order, and their headings.
QUANTITIES = {
    "reliability": "reliability",
    "generalization": "generalization",
    "locality": "locality",
    "same_subject": "other facts of edited subjects",
    "general_abilities": "general abilities",
    "norm": "norm",
    "condition_number": "condition number",
    "drift": "drift",
}
STAGES = ("layers", "values", "keys", "solve", "restrain", "write", "score", "other")
JUDGED = ("reliability", "generalization", "locality")  # whose differences are judged

_SOURCES = {
    "locality/same_subject": "same_subject",
    "stability/mean_frobenius_norm": "norm",
    "stability/worst_condition_number": "condition_number",
    "stability/mean_relative_drift": "drift",
}


def quantities(record: Mapping[str, Any]) -> dict[str, tuple[float, float | None, float | None]]:
    """The figures of a record of ``results.json`` by their names in tables, each with its interval.

    General abilities are the tasks' mean. What is not finite is infinite.
    """
    found = {}
    for key in record:
        name = _SOURCES.get(key, key)
        if name in QUANTITIES:
            bounds = [record.get(f"interval/{key}/{side}") for side in ("low", "high")]
            found[name] = (_number(record[key]), bounds[0], bounds[1])
    scores = [_number(value) for key, value in record.items() if key.startswith("downstream/")]
    if scores:
        found["general_abilities"] = (sum(scores) / len(scores), None, None)
    return found


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def check_same_edits(runs: Mapping[Run, RunData]) -> None:
    """Refuses to compare runs that did not edit the same.

    Raises:
        ValueError: Naming two runs and the first edit in which they differ.
    """
    first: dict[int, Run] = {}
    for run, left in runs.items():
        other = first.setdefault(run.seed, run)
        for number in sorted(left.edits.keys() & runs[other].edits.keys()):
            mine, theirs = (
                [data.edits[number][k] for k in ("case_id", "prompt", "target_new")] for data in (left, runs[other])
            )
            if mine != theirs:
                raise ValueError(
                    f"{run.name} and {other.name} did not make the same edits with seed {run.seed}: edit {number} is "
                    f"case {mine[0]!r} of the one and {theirs[0]!r} of the other. Give all the same --data."
                )


class Comparison:
    """The runs of a comparison, ordered by method.

    Args:
        runs: All that were asked for, at least one.
        complete: Those that are complete, at least one.

    Attributes:
        names, complete: All methods, and those with a complete run.
        figures: A row for each ``name``, ``seed``, count of ``edits`` and ``quantity``: ``value``, ``low``, ``high``.
        seconds: A row for each ``name`` and ``seed``: mean seconds of an edit, ``total`` and by stage.
        points: By count of edits, the figures over seeds by ``name`` and ``quantity``.

    Raises:
        ValueError: If two runs did not make the same edits.
    """

    def __init__(self, runs: Sequence[Run], complete: Sequence[Run]) -> None:
        self.left = {run: read_run(run.folder) for run in complete}
        check_same_edits(self.left)
        self.at, self.n_edits = runs[0].at, runs[0].n_edits
        self.seeds = list(dict.fromkeys(run.seed for run in runs))
        self.names = list(dict.fromkeys(run.name for run in runs))
        self.complete = [name for name in self.names if any(run.name == name for run in complete)]
        rows = [
            (run.name, run.seed, record["edits"], name, *figure)
            for run, data in self.left.items()
            for record in data.records
            for name, figure in quantities(record).items()
        ]
        self.figures = pd.DataFrame(rows, columns=["name", "seed", "edits", "quantity", "value", "low", "high"])
        self.figures = self.figures.astype({"value": float, "low": float, "high": float})
        seconds = {
            (run.name, run.seed): {
                "total": sum(edit["seconds"] for edit in data.edits.values()) / max(1, len(data.edits)),
                **data.seconds_by_stage(),
            }
            for run, data in self.left.items()
        }
        found = pd.DataFrame.from_dict(seconds, orient="index")
        known = [stage for stage in ("total", *STAGES) if stage in found]
        self.seconds = found[known + sorted(set(found) - set(known))].rename_axis(["name", "seed"])

        # Batches may step over a count: it is the first measurement from there on, of every quantity on its own.
        ordered = self.figures.sort_values("edits", kind="stable")
        self.points = {
            count: _over_seeds(ordered[ordered.edits >= count].drop_duplicates(["name", "seed", "quantity"]))
            for count in (0, *self.at)
        }
        start = self.figures[self.figures.edits == 0]
        # Over all runs: methods watch the weights that they may edit.
        self.before = _over_seeds(start.assign(name="before", low=math.nan, high=math.nan))

    def curve(self, name: str, quantity: str) -> pd.DataFrame:
        """A method's figure over seeds, see `_over_seeds`, by count of edits where every seed was measured."""
        rows = self.figures[(self.figures.name == name) & (self.figures.quantity == quantity)]
        found = _over_seeds(rows.replace(math.inf, math.nan), ["edits"])
        return found[found.seeds == rows.seed.nunique()]

    def method(self, name: str) -> str:
        """What the method is, in words, as its first complete run says."""
        return next((str(data.run.get("method", "")) for run, data in self.left.items() if run.name == name), "")

    def _label(self, name: str) -> str:
        missing = len(self.seeds) - sum(run.name == name for run in self.left)
        some = 0 < missing < len(self.seeds)
        return f"{name} ({missing} of {len(self.seeds)} seeds failed)" if some else name

    def markdown(self) -> str:
        """The tables: one for every evaluation point, then differences, then seconds by stage."""
        lines = [f"# {self.n_edits} edits, {len(self.names)} methods", "", *self._preamble(), ""]
        present = [q for q in QUANTITIES if q in set(self.figures.quantity)]
        for count in self.at:
            found, rows = self.points[count], [["before", *(_cell(self.before, "before", q) for q in present)]]
            for name in self.names:
                failed = name not in self.complete
                rows.append([self._label(name), *("failed" if failed else _cell(found, name, q) for q in present)])
            lines += [f"## After {count} edits", "", *_table(["", *(QUANTITIES[q] for q in present)], rows), ""]
        lines += self._judged()
        lines += ["## Seconds per edit, by stage", ""]
        means = self.seconds.fillna(0.0).groupby("name").mean()
        rows = [
            [self._label(n), self.method(n), *([f"{s:.3f}" for s in means.loc[n]] if n in means.index else ["failed"])]
            for n in self.names
        ]
        return "\n".join([*lines, *_table(["", "method", *means.columns], rows)]) + "\n"

    def _judged(self) -> list[str]:
        """What each method is above the first, as far as it is more than chance among the edits."""
        first, rows = self.names[0], []
        bases = {run.seed: data for run, data in self.left.items() if run.name == first}
        for name in self.names[1:]:
            both = [(d, bases[run.seed]) for run, d in self.left.items() if run.name == name and run.seed in bases]
            counts = [common_count(list(pair)) for pair in both]
            cells = [
                judged([difference(*pair, key, n) for pair, n in zip(both, counts, strict=True) if n is not None])
                for key in JUDGED
            ]
            if any(cell != "-" for cell in cells):
                rows.append([name, *cells])
        if not rows:
            return []
        said = (
            "95 % intervals of the difference, edit by edit where both runs made the same edits; over seeds the mean, "
            "and the widest of the intervals. An interval that holds zero is no difference."
        )
        return [f"## Difference from {first}, after the last edit", "", said, "", *_table(["", *JUDGED], rows), ""]

    def _preamble(self) -> list[str]:
        if len(self.seeds) == 1:
            seeds = f"Seed {self.seeds[0]}; in brackets 95 % bootstrap intervals over the requests."
        else:
            seeds = f"Seeds {', '.join(map(str, self.seeds))}: mean (smallest to largest)."
        lines = [
            f"{seeds} Retention over all edits so far, by exact match;",
            "locality against the unedited model; the mean of the general abilities; mean norm, worst condition number",
            "and mean drift of the weights that a method may edit.",
        ]
        named = {"model": "Model", "data": "data", "device": "device", "threads": "CPU threads per run"}
        said = []
        for key, words in named.items():
            abouts = [data.run.get(key) for data in self.left.values()]
            if values := dict.fromkeys(str(about) for about in abouts if about is not None):
                said.append(f"{words}: {', '.join(values)}")
        return [*lines, "", "; ".join(said) + "."] if said else lines

    def csv(self) -> str:
        """A row per method, seed and measurement; the seconds of the whole run in each of its rows."""
        keys = ["name", "method", "seed", "edits"]
        figures = self.figures.replace(math.inf, math.nan)
        figures.insert(1, "method", figures.name.map(self.method))
        wide = figures.pivot(index=keys, columns="quantity")
        bounds = [wide[side].dropna(axis="columns", how="all").add_suffix(f"_{side}") for side in ("low", "high")]
        table = pd.concat([wide["value"].reindex(columns=list(QUANTITIES)), *bounds], axis="columns")
        table = table.join(self.seconds.add_prefix("seconds_"), on=["name", "seed"])
        return str(table.loc[self.complete].reset_index().to_csv(index=False, lineterminator="\n"))

    def plain(self) -> dict[str, Any]:
        """Everything in the tables, for JSON."""
        methods = []
        for name in self.names:
            own = {run: data for run, data in self.left.items() if run.name == name}
            failed = [seed for seed in self.seeds if seed not in {run.seed for run in own}]
            points = {
                str(count): found.loc[name].to_dict("index")
                for count, found in self.points.items()
                if name in found.index
            }
            methods.append(
                {
                    "name": name,
                    "method": self.method(name),
                    "seeds": [run.seed for run in own],
                    "failed_seeds": failed,
                    "threads": [data.run.get("threads") for data in own.values()],
                    "points": points,
                    "seconds_per_edit": self.seconds.loc[name].mean().to_dict() if own else {},
                }
            )
        return {"n_edits": self.n_edits, "at": list(self.at), "seeds": self.seeds, "methods": _finite(methods)}


def _over_seeds(rows: pd.DataFrame, by: Sequence[str] = ("name", "quantity")) -> pd.DataFrame:
    """``mean``, ``values`` and number of ``seeds``; ``low`` and ``high`` are the interval of one seed, or the range."""
    found = rows.groupby(list(by)).agg(
        mean=("value", lambda v: v.mean(skipna=False)),
        least=("value", "min"),
        most=("value", "max"),
        low=("low", "first"),
        high=("high", "first"),
        seeds=("seed", "size"),
        values=("value", list),
    )
    several = (found.seeds > 1) | found.low.isna()
    found["low"], found["high"] = found.low.mask(several, found.least), found.high.mask(several, found.most)
    return found.drop(columns=["least", "most"])


def _finite(value: Any) -> Any:
    """JSON has no word for what is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def judged(differences: Sequence[Difference | None]) -> str:
    """A difference in words: its mean over seeds and the widest interval; none where that holds zero."""
    found = [d for d in differences if d is not None]
    if not found:
        return "-"
    mean = sum(d.value for d in found) / len(found)
    bounds = [(d.low, d.high) for d in found if d.low is not None and d.high is not None]
    if len(bounds) < len(found):
        return f"not judged ({mean:+.2f})"
    low, high = min(b[0] for b in bounds), max(b[1] for b in bounds)
    return f"none ({low:+.2f} to {high:+.2f})" if low <= 0 <= high else f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def _cell(found: pd.DataFrame, name: str, quantity: str) -> str:
    """Mean, and its interval or range unless that has no width."""
    if (name, quantity) not in found.index:
        return "-"
    mean, low, high = (shown(found.loc[(name, quantity), column]) for column in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low} to {high})"


def shown(value: float) -> str:
    """Three digits; "n/a" for what is not finite."""
    return f"{value:.3g}" if math.isfinite(value) else "n/a"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; short rows are filled up with their last cell."""
    width = len(headings)
    full = [[*row, *[row[-1]] * (width - len(row))] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (headings, ["---"] * width, *full)]
