"""O-Edit+: updates that are orthogonal to all edits so far and to the model's implicit knowledge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_edit.algebra.subspaces import cleaned, orthonormal, principal_directions, without, written_basis
from lit_edit.algebra.updates import Additive, LowRank, Update
from lit_edit.editors.restraints.base import Restraint, UpdateKind
from lit_edit.model.edited_weight import EditedWeight
from lit_edit.program import program

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
        max_directions: The most directions of the gradient, the threshold for ``q`` that the paper's appendix C.3
            recommends for long sequences; None for none.
        past: Whether the space of the edits so far is taken. False is an ablation of the paper's table 5.
        cleaning: What is done to ``V_q``. ``orthonormal`` subtracts the part in ``V_r`` and makes the rest orthonormal
            again: the projection that Eq. 15 writes. ``subtract`` only subtracts, which is Eq. 28 as printed; as the
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
        self.needs_gradient = gradient_share > 0

    def check(self, kind: UpdateKind, before: Sequence[Restraint] = (), after: Sequence[Restraint] = ()) -> None:
        """Refuses updates that are of full rank, unless earlier edits are left out, and what undoes the projection."""
        super().check(kind, before, after)
        spreading = [type(restraint).__name__ for restraint in before if restraint.spreads]
        if self.past and (kind.dense or spreading):
            full = " after ".join([*reversed(spreading), kind.name])
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
    def restrain(self, update: Update, site: EditedWeight) -> Update:
        """The update's part outside of both spaces; a low-rank update stays one.

        Raises:
            ValueError: if a statistic is missing, or if the spaces leave nothing of the update.
        """
        past, implicit = self.spaces(site)
        if isinstance(update, LowRank):
            left = update.left.to(past.device)
            restrained: Update = LowRank(left=without(without(left, past), implicit), right=update.right)
        else:
            restrained = Additive(without(without(update.delta(site.weight), past), implicit))
        if update.norm > 0 and restrained.norm <= _NOTHING * update.norm:
            d, r, q = past.shape[0], past.shape[1], implicit.shape[1]
            raise ValueError(
                f"O-Edit+ finds no room for another edit in layer {site.name!r}: of {d} output directions "
                f"{r} are taken by the edits so far and {q} by the gradient, and the whole update lies in "
                f"them. Lower gradient_share ({self.implicit.share:g}), set max_directions, or write fewer edits."
            )
        return restrained

    def spaces(self, site: EditedWeight) -> tuple[Tensor, Tensor]:
        """``V_r (d, r)`` and the cleaned ``V_q (d, q)``, both in float64."""
        past = implicit = torch.empty(site.shape[0], 0, dtype=torch.float64, device=site.device)
        if self.past:
            past = written(site, site.rank)
        if self.needs_gradient:
            implicit = self.implicit.directions(site)
            if self.cleaning != "none":
                implicit = cleaned(implicit, past)
            if self.cleaning == "orthonormal":
                implicit = orthonormal(implicit)
        return past, implicit


class ImplicitKnowledge:
    """``V_q``: the leading directions of a model's own gradient, more of them with every edit (O-Edit, section 3.2.2).

    ``q = ⌊share · edits⌋``, at most ``limit`` and the gradient's rank. Every gradient is decomposed once.

    Args:
        share: ``λ3``, directions per edit; 0 for none.
        limit: Most directions; None for no limit of its own.

    Raises:
        ValueError: For a share that is negative or not finite, or a limit below 0.
    """

    def __init__(self, share: float, limit: int | None = None) -> None:
        if not 0 <= share < float("inf"):
            raise ValueError(f"The gradient's share of directions per edit must be at least 0, not {share}.")
        if limit is not None and limit < 0:
            raise ValueError(f"The most directions of the gradient cannot be {limit}: give a number, or null for all.")
        self.share, self.limit = float(share), limit

    def directions(self, site: EditedWeight) -> Tensor:
        """``V_q (d, q)`` of a layer in float64, orthonormal; the batch being written counts.

        Raises:
            ValueError: If there is no gradient.
        """
        gradient = site.gradient
        if gradient is None:
            raise ValueError(
                f"There is no gradient of the language-model loss for layer {site.name!r}: collect it with "
                f"`{program()} statistics`, or leave implicit knowledge out (gradient_share 0)."
            )
        found = site.derived("principal directions of the gradient", lambda: principal_directions(gradient))
        # A product like 0.29 * 100 comes out just below the whole number it stands for.
        number = int(self.share * (site.edits + site.pending) + 1e-9)
        return found[:, : number if self.limit is None else min(number, self.limit)]


def written(site: EditedWeight, rank: int | None = None) -> Tensor:
    """``V_r (d, r)`` of a layer (see `written_basis`).

    Args:
        site: The layer.
        rank: Bound on the rank of all edits so far; one per request if None, the leading directions where they are
            more.
    """
    exact = site.exact
    return written_basis(exact.dense(), site.original.to(site.device), site.edits if rank is None else rank, exact.eps)
