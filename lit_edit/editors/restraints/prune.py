"""PRUNE: the sum of all updates is kept from outgrowing the weight it was added to."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lit_edit.algebra.linalg import singular_values, svd_of_rank
from lit_edit.algebra.updates import LowRank
from lit_edit.editors.restraints.base import Restraint
from lit_edit.model.edited_weight import EditedWeight

_NEGLIGIBLE = 1e-4  # of the largest singular value: what is cut is above it, and then off by less than 1e-8


class PRUNE(Restraint):
    r"""Restraint on the singular values of the sum of all updates (PRUNE, Ma et al. 2025, Eq. 3-6).

    With ``ΔW = W − W_0`` and ``σ_max`` the largest singular value of ``W_0``, every singular value ``σ`` of ``ΔW``
    above ``σ_max`` becomes

    .. math:: F(σ) = \log_α σ - \log_α σ_{max} + σ_{max} \qquad \text{or} \qquad F(σ) = σ / β + (1 - 1 / β)\, σ_{max}

    (its Eq. 5, and the linear form of its appendix C.3); the others stay, and so do all singular vectors. The weight
    becomes ``W_0 + ΔW'``: the pruned sum takes the place of the sum and is not added on top of it.

    Both forms meet the identity at ``σ_max`` and rise with ``σ``. The linear one never exceeds ``σ``. The logarithm
    leaves ``σ_max`` with the slope ``1 / (σ_max ln α)``; where that is above 1 (small weights, or ``α`` close to 1) the
    formula as printed *enlarges* the values just above ``σ_max``. They then stay as they are: ``min(F(σ), σ)``.

    A sum that was pruned before is pruned again with whatever was added since, ``F`` on top of ``F``.

    Args:
        alpha: ``α``, the base of the logarithm, above 1; larger is stricter. Published for CounterFact: 1.2 (ROME; 1.5
            on llama3-8b), 1.2 or e (MEMIT, by model).
        form: ``log`` or ``linear``.
        beta: ``β`` of the linear form, above 1.
        every_n: Prune whenever this many further requests were applied, in whichever layers (its appendix C.6), after
            the batch that reaches or crosses the count, and not at the end; None prunes once, at the end of a run, as
            in the paper's main experiments.

    Raises:
        ValueError: for numbers out of range or an unknown form.
    """

    def __init__(
        self,
        alpha: float = 1.2,
        form: Literal["log", "linear"] = "log",
        beta: float = 2.0,
        every_n: int | None = None,
    ) -> None:
        for name, base in (("alpha", alpha), ("beta", beta)):
            if not 1 < base < math.inf:
                raise ValueError(
                    f"PRUNE's {name} must be above 1 and finite, got {base}: at 1 and below it would not restrain."
                )
        if form not in ("log", "linear"):
            raise ValueError(f"The form of PRUNE is 'log' or 'linear', not {form!r}.")
        if every_n is not None and every_n < 1:
            raise ValueError(
                f"PRUNE's every_n is a number of requests, 1 or more, not {every_n}; null prunes at the end."
            )
        self.alpha, self.form, self.beta, self.every_n = alpha, form, beta, every_n

    def total(self, site: EditedWeight, before: int, after: int) -> LowRank | None:
        """With ``every_n``, what takes the weight to ``W_0 + ΔW'`` whenever the count is reached or crossed."""
        due = self.every_n is not None and after // self.every_n > before // self.every_n
        return self._pruned(site) if due else None

    def finish(self, site: EditedWeight) -> LowRank | None:
        """Without ``every_n``, what takes the weight to ``W_0 + ΔW'``, of the rank of what is too large."""
        return self._pruned(site) if self.every_n is None else None

    @torch.no_grad()
    def _pruned(self, site: EditedWeight) -> LowRank | None:
        weight = site.exact.dense()
        original = site.original.to(weight)
        if torch.equal(weight, original):
            return None
        largest = singular_values(original)[0]
        u, sigma, vt = svd_of_rank(weight - original, site.rank, _NEGLIGIBLE * float(largest))
        cut = self.restrained(sigma, largest) - sigma
        rank = int((cut < 0).sum())  # descending, and what is cut stands in front
        return LowRank(left=u[:, :rank] * cut[:rank], right=vt[:rank]) if rank else None

    def restrained(self, sigma: Tensor, largest: Tensor) -> Tensor:
        """The singular values after pruning.

        Args:
            sigma: Singular values of the sum of all updates, any shape.
            largest: ``σ_max`` of the weight before the first edit, positive.
        """
        if self.form == "log":
            pruned = largest + (sigma.clamp(min=largest) / largest).log() / math.log(self.alpha)
        else:
            pruned = sigma / self.beta + (1 - 1 / self.beta) * largest
        return torch.where(sigma > largest, torch.minimum(pruned, sigma), sigma)
