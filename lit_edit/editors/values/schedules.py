"""Schedules: how the steps of a value's optimisation are laid out."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_edit.editors.values.constraints import Constraint
from lit_edit.editors.values.elastic_net import ElasticNet
from lit_edit.settings import Configured

Rule = Literal["weighted_gradient", "gradient", "magnitude", "random"]


@dataclass(frozen=True, eq=False)
class Stage:
    """One run of Adam over all problems, each of which ends it by itself.

    Args:
        steps: Largest number of steps.
        start: Changes to begin with, (slots, d); None for no change.
        free: 1 where a coordinate may change, 0 where it stays as it starts, (slots, d); None for all free.
        term: A further term of the loss, from the changes (slots, d) to a number per slot (slots,).
    """

    steps: int
    start: Tensor | None = None
    free: Tensor | None = None
    term: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Descent:
    """What a stage found.

    ``change`` and ``mean_gradient``, that of the loss with respect to the change over the steps taken, are (slots, d);
    the others have an entry per problem.
    """

    change: Tensor
    mean_gradient: Tensor
    loss: list[float]
    probability: list[float]
    steps: list[int]


class Schedule(Configured, ABC):
    """Lays out the steps of an optimisation."""

    def check(self, constraint: Constraint) -> None:
        """Raises ValueError for constraints that the schedule cannot keep; asked when values are put together."""

    @abstractmethod
    def run(self, descend: Callable[[Stage], Descent], steps: int) -> Descent:
        """Runs one stage or several and gives the last one's result, with the steps of all of them.

        Args:
            descend: Runs a stage, with an Adam of its own.
            steps: Number of steps of all stages together.
        """


class Plain(Schedule):
    """One stage: ROME, MEMIT and all others."""

    def run(self, descend: Callable[[Stage], Descent], steps: int) -> Descent:
        """A single stage of all steps."""
        return descend(Stage(steps))


class EAC(Schedule):
    r"""Editing anchor compression (Xu et al. 2025): few coordinates of a value change, and those little.

    The first half of the steps optimises the change ``δ`` as usual. Its coordinates are then scored, ``score = |δ ⊙
    ∇L|`` with the mean gradient over these steps (Eq. 1), and those from the ``percentile``-th percentile of the scores
    up, the editing anchors, are kept (Eq. 2). The other half starts anew from the anchors and trains nothing else; all
    other coordinates of ``δ`` are exactly 0 (Eq. 3). The loss gains ``λ Σ |z_i| / (score_i + ε) + μ ‖z‖²`` (Eq. 4-6).

    The paper writes v\* for the change; what it says, that other dimensions stay unmodified, holds for ``δ``. A problem
    that reaches the loss to stop at ends its first stage there: more steps would only lengthen what already suffices.
    The second stage has the other half of the steps in any case. Every problem, and every layer of one, has a map of
    its own.

    Args:
        percentile: ``γ`` in percent. ZsRE: 80 (gpt2-xl), 90 with ROME and 95 with MEMIT (llama3-8b); CounterFact: 85
            and 95. 0 keeps every coordinate.
        l1: ``λ``. Released code for ROME never adds this term: 0.
        l2: ``μ``: 0.5 (gpt2-xl), 1e-3 (llama3-8b).
        saliency: False keeps every coordinate, as an ablation; the scores still weigh the net.
        elastic_net: False leaves the net out, as an ablation.
        eps: ``ε``, in the unit of a score, which is that of a loss. The paper gives no number.
        rule: What anchors are chosen by: ``weighted_gradient`` is the score above; ``gradient`` (``|∇L|``),
            ``magnitude`` (``|δ|``) and ``random`` are the paper's controls (Fig. 8). The net is weighed by the score
            in any case. Random coordinates differ from value to value, and are the same for the same value.

    Raises:
        ValueError: for a percentile outside of [0, 100), an unknown rule, or weights that `ElasticNet` refuses.
    """

    def __init__(
        self,
        percentile: float = 80.0,
        l1: float = 5e-7,
        l2: float = 1e-3,
        saliency: bool = True,
        elastic_net: bool = True,
        eps: float = 1e-8,
        rule: Rule = "weighted_gradient",
    ) -> None:
        if not 0 <= percentile < 100:
            raise ValueError(f"EAC's percentile must be at least 0 and below 100, not {percentile}.")
        if rule not in get_args(Rule):
            raise ValueError(f"EAC chooses anchors by {', '.join(get_args(Rule))}, not by {rule!r}.")
        self.rule = rule
        self.percentile, self.saliency, self.elastic_net = percentile, saliency, elastic_net
        self.net = ElasticNet(l1, l2, eps)

    def check(self, constraint: Constraint) -> None:
        """Refuses constraints whose value replaces the output: to rescale it would move every coordinate."""
        if constraint.replaces:
            raise ValueError(
                f"EAC leaves most coordinates of a value as they are, and {type(constraint).__name__} rescales all of "
                "them. Take NormClamp, or leave the schedule out."
            )

    def run(self, descend: Callable[[Stage], Descent], steps: int) -> Descent:
        """Two stages, half of the steps each; the second takes the odd one."""
        half = max(1, steps // 2)
        first = descend(Stage(half))
        score = (first.mean_gradient * first.change).abs()
        kept = anchors(self._merit(first, score), self.percentile) if self.saliency else None

        def net(change: Tensor) -> Tensor:
            return self.net(change, score)

        second = descend(
            Stage(
                steps - half,
                start=first.change if kept is None else first.change * kept,
                free=kept,
                term=net if self.elastic_net else None,
            )
        )
        return replace(second, steps=[a + b for a, b in zip(first.steps, second.steps, strict=True)])

    def _merit(self, found: Descent, score: Tensor) -> Tensor:
        """What coordinates are chosen by, ``(slots, d)``."""
        if self.rule == "gradient":
            return found.mean_gradient.abs()
        if self.rule == "magnitude":
            return found.change.abs()
        if self.rule == "random":
            rows = [zlib.crc32(row.detach().cpu().contiguous().numpy().tobytes()) for row in found.change.float()]
            drawn = [torch.rand(score.shape[-1], generator=torch.Generator().manual_seed(row)) for row in rows]
            return torch.stack(drawn).to(score)
        return score


def anchors(score: Tensor, percentile: float) -> Tensor:
    """1 for the coordinates whose score is at or above a percentile of its row's, 0 for the others (EAC, Eq. 2).

    Args:
        score: (..., d), at least 0.
        percentile: Percentile in [0, 100); linear between order statistics.

    Returns:
        (..., d), in the scores' dtype.
    """
    # Rounded, because 0.8 * 1600 may come out just above the whole number it stands for.
    rank = ceil(round(percentile / 100 * (score.shape[-1] - 1), 9)) + 1
    return (score >= score.kthvalue(rank, dim=-1, keepdim=True).values).to(score.dtype)
