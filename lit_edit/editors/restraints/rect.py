"""RECT: only the entries of an update that change the weight most, in proportion, are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_edit.algebra.updates import Additive, Update
from lit_edit.editors.restraints.base import Restraint
from lit_edit.model.edited_weight import EditedWeight


class RECT(Restraint):
    """Relative-change restraint on every update (RECT; Gu et al. 2024).

    Of the ``d·p`` entries of ``ΔW`` those with the largest ``|ΔW / W|`` are kept, exactly ``round(keep · d · p)`` of
    them, and the others set to zero. ``W`` is the weight as it is before the update. Where ``W`` is zero, any change is
    infinitely large in proportion and no change is none. Among equals the larger ``|ΔW|`` goes first, then the entry
    that comes first, row by row.

    What is kept is in general of full rank, whatever the update was, and lies in other directions than its columns.
    Hence nothing stays orthogonal to the edits so far: beside `OEditPlus` it is refused, except before one that leaves
    these out (``past: false``). Unless all entries are kept, of course.

    Args:
        keep: Share of entries kept, above 0 and at most 1: 0.2 in the paper, 0.4 in a widely used toolkit. 1 leaves
            every update as it is.

    Raises:
        ValueError: if ``keep`` is out of range.
    """

    def __init__(self, keep: float = 0.2) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"RECT keeps a share of the entries above 0 and at most 1, not {keep}.")
        self.keep = keep
        self.spreads = keep < 1

    @torch.no_grad()
    def restrain(self, update: Update, site: EditedWeight) -> Update:
        """The update with its smaller relative changes set to zero; the update itself if all are kept."""
        if self.keep == 1:
            return update
        change = update.delta(site.weight)
        return Additive(change * _largest(change, site.exact.dense(), self.keep))


def _largest(change: Tensor, weight: Tensor, keep: float) -> Tensor:
    """True at the entries to keep, ``(d, p)``."""
    size = change.abs().flatten()
    count = round(keep * size.numel())
    ratio = torch.where(size > 0, size / weight.abs().flatten(), 0.0)
    kept = torch.zeros_like(size, dtype=torch.bool)
    if count:
        least = ratio.kthvalue(len(ratio) - count + 1).values
        kept = ratio > least
        tied = (ratio == least).nonzero()[:, 0]
        order = size[tied].argsort(descending=True, stable=True)
        kept[tied[order[: count - int(kept.sum())]]] = True
    return kept.reshape(change.shape)
