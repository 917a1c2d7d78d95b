"""O-Edit+: updates that are orthogonal to all edits so far and to the model's implicit knowledge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_edit.algebra.subspaces import ImplicitKnowledge, cleaned, orthonormal, without, written_basis
from lit_edit.algebra.updates import Additive, LowRank, Update
from lit_edit.editors.restraints.base import Ground, Restraint, Source

_NOTHING = 1e-9  # of an update: what a projection leaves of it is then its own rounding


class OEditPlus(Restraint):
    r"""Projects every update out of the spaces that are taken (O-Edit+, Cai and Cao 2024, Eq. 15 and 28).

    .. math:: ΔW \leftarrow ΔW - V_r V_r^\top ΔW, \qquad ΔW \leftarrow ΔW - V_q V_q^\top ΔW

    ``V_r (d, r)`` is a basis of the column space of all edits in the layer so far, so that ``ΔW_iᵀ ΔW_j = 0`` for any
    two batches of edits. ``V_q (d, q)`` are the ``q = ⌊gradient_share · edits⌋`` leading left singular vectors of the
    gradient of the language-model loss on text, without their part in ``V_r``; edits are those in the layer, the
    batch's own included.

    Both spaces only grow: with ``n`` edits about ``(1 + gradient_share) n`` of the ``d`` directions are taken, and
    ``(m + gradient_share) n`` by an editor whose updates have rank ``m`` (MEND: one per token). When all are, there is
    nothing left that an update could be written to, and `restrain` says so.

    An update of full rank takes all directions at once. Where updates are (`FineTune`, or `RECT` working on them
    before), the second could be orthogonal to the first only by being zero; this is refused, and goes with
    ``past: false`` only, which does not promise it. `RECT` working afterwards would bring updates back into either
    space, and is always refused.

    Args:
        gradient_share: ``λ3``. Published: 2.5 on ROME; on MEMIT 2 (Mistral-7B) and 1 (Llama3-8B). 0 leaves implicit
            knowledge out, and no gradient is collected.
        max_directions: the most directions of the gradient, the threshold for ``q`` that the paper's appendix C.3
            recommends for long sequences; None for none.
        past: whether the space of the edits so far is taken. False is an ablation of the paper's table 5.
        cleaning: what is done to ``V_q``. ``orthonormal`` subtracts the part in ``V_r`` and makes the rest orthonormal
            again: the projection that Eq. 15 writes. ``subtract`` only subtracts, which is Eq. 28 to the letter; as the
            rest has lost its length, updates keep a part along it. ``none`` does neither (table 5).

    Raises:
        ValueError: for a share or a limit below 0, an unknown cleaning, or if neither space is to be left out.
    """

    def __init__(
        self,
        gradient_share: float = 2.5,
        max_directions: int | None = None,
        past: bool = True,
        cleaning: Literal["orthonormal", "subtract", "none"] = "orthonormal",
    ) -> None:
        self.implicit = ImplicitKnowledge(gradient_share, max_directions)
        if cleaning not in ("orthonormal", "subtract", "none"):
            raise ValueError(f"The cleaning of O-Edit+ is 'orthonormal', 'subtract' or 'none', not {cleaning!r}.")
        if not past and not gradient_share:
            raise ValueError("O-Edit+ has no space to project out: set `past: true` or a gradient_share above 0.")
        self.past, self.cleaning = past, cleaning
        self.needs_original = past
        self.needs_gradient = gradient_share > 0

    def check(self, source: Source, before: Sequence[Restraint] = (), after: Sequence[Restraint] = ()) -> None:
        """Refuses updates that are of full rank, unless earlier edits are left out, and what undoes the projection."""
        super().check(source, before, after)
        spreading = [type(restraint).__name__ for restraint in before if restraint.spreads]
        if self.past and (source.dense or spreading):
            full = " after ".join([*reversed(spreading), source.name])
            raise ValueError(
                f"O-Edit+ keeps updates out of the column space of all edits so far, and an update by {full} has full "
                "rank: the first one fills the whole space. Set `past: false` to project out of the gradient's "
                "directions alone, or leave one of the two out."
            )
        for restraint in after:
            if restraint.spreads:
                raise ValueError(
                    f"{type(restraint).__name__} after O-Edit+ changes single entries of an update and brings it back "
                    "into the spaces that O-Edit+ has projected it out of. Leave one of the two out, or put O-Edit+ "
                    "last with `past: false`."
                )

    @torch.no_grad()
    def restrain(self, update: Update, ground: Ground) -> Update:
        """The update's part outside of both spaces; a low-rank update stays one.

        Raises:
            ValueError: if a statistic is missing, or if the spaces leave nothing of the update.
        """
        past, implicit = self.spaces(ground)
        if isinstance(update, LowRank):
            left = update.left.to(past.device)
            restrained: Update = LowRank(left=without(without(left, past), implicit), right=update.right)
        else:
            restrained = Additive(without(without(update.delta(ground.weight), past), implicit))
        if update.norm > 0 and restrained.norm <= _NOTHING * update.norm:
            d, r, q = past.shape[0], past.shape[1], implicit.shape[1]
            raise ValueError(
                f"O-Edit+ finds no room for edit {ground.edits + 1} in layer {ground.layer!r}: of {d} output "
                f"directions {r} are taken by the edits so far and {q} by the gradient, and the whole update lies in "
                f"them. Lower gradient_share ({self.implicit.share:g}), set max_directions, or write fewer edits."
            )
        return restrained

    def spaces(self, ground: Ground) -> tuple[Tensor, Tensor]:
        """``V_r (d, r)`` and the cleaned ``V_q (d, q)``, both in float64."""
        past = ground.weight.new_zeros((len(ground.weight), 0), dtype=torch.float64)
        implicit = past
        if self.past:
            past = written(ground, ground.rank_here)
        if self.needs_gradient:
            implicit = self.implicit.directions(ground.gradient, ground.edits_here + ground.batch_here, ground.layer)
            if self.cleaning != "none":
                implicit = cleaned(implicit, past)
            if self.cleaning == "orthonormal":
                implicit = orthonormal(implicit)
        return past, implicit


def written(ground: Ground, rank: int | None = None) -> Tensor:
    """``V_r (d, r)`` of a layer (see `written_basis`).

    Args:
        ground: the layer.
        rank: what the rank of all edits so far is at most; one per request if None, the leading directions where they
            are more.

    Raises:
        ValueError: if its weight before the first edit was not kept.
    """
    if ground.original is None:
        raise ValueError(f"The weight of layer {ground.layer!r} before the first edit was not kept (originals).")
    original = ground.original.to(ground.weight.device)
    edits = ground.edits_here if rank is None else rank
    return written_basis(ground.exact.dense(), original, edits, ground.exact.eps)
