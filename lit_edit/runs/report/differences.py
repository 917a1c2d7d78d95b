"""Whether two runs differ by more than their intervals.

Runs of the same edits are compared edit by edit: the 95 % bootstrap interval of the mean difference over edits, which
what is hard for both runs does not widen. Where single answers are not on file, or the edits are others, the interval
of the difference comes from the two figures' own intervals (MOVER: Zou and Donner 2008, Statistics in Medicine 27,
1693). A difference is called one if its interval leaves out zero. Figures without intervals, or over fewer than
`FEWEST` edits, of which resamples say too little, are not judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lit_edit.evaluation.evaluate import interval

from .gather import RunData

FEWEST = 10
_SAME = 1e-6  # two figures that were rounded apart


@dataclass(frozen=True)
class Difference:
    """What a figure of one run is above that of another.

    Attributes:
        value: The difference.
        low, high: Its 95 % interval; None where the figures have none.
        how: ``edit by edit``, ``by intervals``, ``too few edits``, or ``not judged``.
    """

    value: float
    low: float | None = None
    high: float | None = None
    how: Literal["edit by edit", "by intervals", "too few edits", "not judged"] = "not judged"

    @property
    def clear(self) -> bool | None:
        """Whether it is more than chance among the edits explains; None where that is not known."""
        if self.low is None or self.high is None:
            return None
        return not self.low <= 0 <= self.high


def common_count(runs: list[RunData]) -> int | None:
    """The last count of edits that all runs were judged at; None where there is none."""
    counts = [{r["edits"] for r in run.records if r["edits"] and "reliability" in r} for run in runs]
    shared = set.intersection(*counts) if counts else set()
    return max(shared, default=None)


def difference(one: RunData, other: RunData, key: str, edits: int) -> Difference | None:
    """What a figure of ``one`` is above that of ``other`` after a number of edits; None where one of them has none."""
    a, b = one.figure(key, edits), other.figure(key, edits)
    if a is None or b is None:
        return None
    by_edit = _by_edit(one, other, key, edits)
    asked = [run.figure(f"count/{key}", edits) for run in (one, other)]
    if (len(by_edit) if by_edit is not None else min((n for n in asked if n is not None), default=FEWEST)) < FEWEST:
        return Difference(a - b, how="too few edits")
    if by_edit is not None:
        low, high = interval(by_edit)
        return Difference(a - b, low, high, "edit by edit")
    bounds_a, bounds_b = one.bounds(key, edits), other.bounds(key, edits)
    if bounds_a is None or bounds_b is None:
        return Difference(a - b)
    down = math.hypot(a - bounds_a[0], bounds_b[1] - b)
    up = math.hypot(bounds_a[1] - a, b - bounds_b[0])
    return Difference(a - b, a - b - down, a - b + up, "by intervals")


def _by_edit(one: RunData, other: RunData, key: str, edits: int) -> np.ndarray[tuple[int], np.dtype[np.float64]] | None:
    """The differences of single edits, if both runs have them for the same edits and the figures are their means."""
    if edits not in one.evaluations or edits not in other.evaluations:
        return None
    mine, theirs = (run.evaluations[edits].scores.get(key, {}) for run in (one, other))
    if not mine or mine.keys() != theirs.keys():
        return None
    for run, scores in ((one, mine), (other, theirs)):
        figure = run.figure(key, edits)
        # Judged in another way than by exact match, which is what the file of outcomes says of probes.
        if figure is None or abs(sum(scores.values()) / len(scores) - figure) > _SAME:
            return None
    return np.array([mine[case] - theirs[case] for case in mine])
