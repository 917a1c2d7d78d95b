"""Guards: what becomes of an edit that goes wrong, decided before and right after the model is touched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lit_edit.editors.base import Plan
from lit_edit.model.edited_weight import Written

OnFailedEdit = Literal["keep", "retry", "skip", "undo", "stop"]


class FailedEditError(RuntimeError):
    """An edit failed, and the run is to stop at one (``on_failed_edit: stop``). The edit is not in the weights."""


@dataclass(frozen=True)
class Guard:
    """What becomes of an edit that fails.

    An edit *explodes* if its values or update are not finite, or if it changes a layer by more than `max_change` times
    the weight's norm. It is never left in the weights. An edit *fails* if its target has less than `margin` of
    probability; then ``on_failed_edit`` decides. What was refused, tried again or taken back is in the journal, in
    ``results.json`` and in the summary at the end of a run.

    Args:
        on_failed_edit: ``keep`` leaves it in the weights, as the papers do; ``retry`` writes it again on top, up to
            `tries` times; ``skip`` does not write what fails with v* in place already; ``undo`` also takes back what
            fails after writing; ``stop`` takes it back and ends the run.
        margin: Probability of the whole target.
        max_change: Norm of a layer's change in norms of the weight.
        tries: Times that ``retry`` writes again.

    Raises:
        ValueError: For a value out of range.
    """

    on_failed_edit: OnFailedEdit = "keep"
    margin: float = 0.1
    max_change: float = 10.0
    tries: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 1 or not self.max_change > 0 or self.tries < 1:
            raise ValueError(
                "A guard needs a margin from 0 to below 1, a max_change above 0 and at least 1 try, not "
                f"{self.margin}, {self.max_change} and {self.tries}."
            )

    def refused_plans(self, plan: Plan) -> dict[int, str]:
        """Requests of a plan, by place, that are not to be written, and why."""
        found = {}
        for i, (loss, p) in enumerate(zip(plan.loss, plan.probability, strict=True)):
            if not math.isfinite(loss) or not math.isfinite(p):
                found[i] = "the optimisation of its values gave numbers that are not finite"
            elif p < self.margin and self.on_failed_edit in ("skip", "undo", "stop"):
                found[i] = f"its target has probability {p:.3f} with v* in place, below the margin of {self.margin}"
        return found

    def explosion(self, written: Sequence[Written]) -> str | None:
        """Why a batch that was written has to go, if it has."""
        for item in written:
            if not item.relative_change <= self.max_change:
                return (
                    f"it changes layer {item.layer} by {item.relative_change:.3g} times the norm of its weight, more "
                    f"than {self.max_change:g}"
                )
        return None

    def failed(self, p_target: Sequence[float]) -> dict[int, str]:
        """Requests that fail after writing, by place, and why."""
        return {
            i: f"its target has probability {p:.3f} after writing, below the margin of {self.margin}"
            for i, p in enumerate(p_target)
            if not p >= self.margin
        }
