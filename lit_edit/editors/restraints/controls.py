"""Controls of O-Edit's paper: other ways to make updates smaller, which should not help as much (its section 5.3)."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from lit_edit.algebra.subspaces import without
from lit_edit.algebra.updates import Additive, LowRank, Update
from lit_edit.editors.restraints.base import Restraint
from lit_edit.model.edited_weight import EditedWeight

_NOTHING = 1e-9  # of an update: what a projection leaves of it is then its own rounding


class Scaling(Restraint):
    """Multiplies every update by a number below 1 (O-Edit, section 5.3, its fourth control; Tables 2 and 9).

    Args:
        factor: ``η``, above 0 and below 1.

    Raises:
        ValueError: If it is not.
    """

    def __init__(self, factor: float = 0.6) -> None:
        if not 0 < factor < 1:
            raise ValueError(f"Scaling makes updates smaller: the factor is above 0 and below 1, not {factor}.")
        self.factor = factor

    @torch.no_grad()
    def restrain(self, update: Update, site: EditedWeight) -> Update:
        """``η ΔW``; a low-rank update stays one."""
        if isinstance(update, LowRank):
            return LowRank(self.factor * update.left, update.right)
        return Additive(self.factor * update.delta(site.weight))


class RandomDeletion(Restraint):
    """Sets random entries of every update to zero (O-Edit, section 5.3, its second control; Tables 2 and 9).

    `RECT` keeps the entries that change the weight most, this one any. Other entries go with every batch; the same ones
    for the same seed, layer and number of edits so far.

    Args:
        keep: Share of the entries kept, above 0 and at most 1.
        seed: Seed of the choice.

    Raises:
        ValueError: If the share is out of range.
    """

    def __init__(self, keep: float = 0.4, seed: int = 0) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"Random deletion keeps a share of the entries above 0 and at most 1, not {keep}.")
        self.keep, self.seed = keep, seed
        self.spreads = keep < 1

    @torch.no_grad()
    def restrain(self, update: Update, site: EditedWeight) -> Update:
        """The update with exactly ``round(keep · d · p)`` of its entries."""
        if self.keep == 1:
            return update
        change = update.delta(site.weight)
        order = torch.randperm(change.numel(), generator=generator(self.seed, site.layer, site.edits))
        kept = torch.zeros(change.numel(), dtype=change.dtype)
        kept[order[: round(self.keep * change.numel())]] = 1.0
        return Additive(change * kept.reshape(change.shape).to(change.device))


class RandomSubspace(Restraint):
    """Projects every update out of a random subspace (O-Edit, section 5.3, its third control; Tables 2 and 9).

    As large as the space that `OEditPlus` takes, which grows with every edit, but with nothing of the edits or the
    model in it. Directions stay taken: the subspace of a later edit contains that of an earlier one.

    Args:
        share: Directions per edit in the layer, the batch's own included; `OEditPlus` takes about
            ``1 + gradient_share``.
        max_directions: Most directions; None for none but the layer's own.
        seed: Seed of the directions; every layer has its own.

    Raises:
        ValueError: For a share that is not positive, or a limit below 1.
    """

    def __init__(self, share: float = 2.0, max_directions: int | None = None, seed: int = 0) -> None:
        if not 0 < share < float("inf"):
            raise ValueError(f"A random subspace needs a share of directions per edit above 0, not {share}.")
        if max_directions is not None and max_directions < 1:
            raise ValueError(f"The most directions cannot be {max_directions}: give 1 or more, or null for all.")
        self.share, self.max_directions, self.seed = share, max_directions, seed

    @torch.no_grad()
    def restrain(self, update: Update, site: EditedWeight) -> Update:
        """The update's part outside; a low-rank update stays one.

        Raises:
            ValueError: If nothing is left of the update.
        """
        basis = self.basis(site)
        if isinstance(update, LowRank):
            restrained: Update = LowRank(without(update.left.to(basis.device), basis), update.right)
        else:
            restrained = Additive(without(update.delta(site.weight), basis))
        if update.norm > 0 and restrained.norm <= _NOTHING * update.norm:
            raise ValueError(
                f"The random subspace leaves nothing of an edit in layer {site.name!r}: {basis.shape[1]} of "
                f"{site.shape[0]} directions are taken. Lower share ({self.share:g}), or set max_directions."
            )
        return restrained

    def basis(self, site: EditedWeight) -> Tensor:
        """``(d, q)`` in float64, orthonormal: the first ``q = ⌊share · edits⌋`` of the layer's random directions."""
        d = site.shape[0]

        def directions() -> Tensor:
            drawn = torch.randn(d, d, generator=generator(self.seed, site.layer), dtype=torch.float64)
            return torch.linalg.qr(drawn).Q.to(site.device)

        found = site.derived(f"random directions {self.seed}", directions)
        number = int(self.share * (site.edits + site.pending) + 1e-9)
        return found[:, : number if self.max_directions is None else min(number, self.max_directions)]


def generator(*parts: int) -> torch.Generator:
    """Random numbers of a seed and what they are for; the same wherever they are drawn."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, parts)).encode()))
