"""MOSE on the side of the keys: turn what the weight reads instead of what it puts out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lit_edit.algebra.exact import ExactWeight
from lit_edit.algebra.krylov import Preserved, procrustes_near_identity
from lit_edit.algebra.linalg import procrustes, solve_factored, solve_spd
from lit_edit.algebra.updates import Rotation, UnwritableError
from lit_edit.editors.solvers.base import Solver, check_positive
from lit_edit.model.edited_weight import EditedWeight

FOLD_AT = 128  # columns beside the eigenbasis
_NAME, _TRIANGLE = "MOSEKey.eigenvectors", "MOSEKey.triangle"  # of what is kept for a layer
_CORRECTIONS, _EXACT = 6, 1e-12  # of solutions with a triangle: how often at most, and what is good enough
_NOTHING = 1e-8  # of a key's length: a null-space part this short is rounding and points nowhere


class MOSEKey(Solver):
    r"""Multiplicative orthogonal edit from the right, ``W ← W Q``: MOSE's Procrustes problem, posed for the keys.

    MOSE turns outputs and thereby those of *every* key. Turning keys leaves the singular values just as they are, and
    moves the output of a key only by its share in the plane that is turned. To bring the output of ``k`` to ``v``, the
    rotation has to take ``k`` to a key ``k*`` of the same length that ``W`` maps to ``v``; it minimises

    .. math:: λ\, E‖Q k - k‖^2 + ‖Q M - M‖^2 + ‖Q K - K^*‖^2, \qquad Q^\top Q = I

    over the tokens of a corpus, the keys ``M`` of past edits and the keys ``K`` of this batch, hence

    .. math:: λ C + M M^\top + K^* K^\top = U Σ H^\top, \qquad Q = U H^\top.

    ``k*`` is chosen by ``target``:

    * ``exact``: its part in the row space of ``W`` is ``W⁺ v``, the only one with ``W k* = v`` (or, where ``W`` does
      not have that output, the nearest), and its part in the null space is that of ``k``, scaled so that
      ``‖k*‖ = ‖k‖``.
      Where ``‖W⁺ v‖ > ‖k‖`` no such key exists; ``k*`` is then ``W⁺ v`` shortened to ``‖k‖``, the point of the sphere
      nearest to it, which gives the direction of ``v`` at less than its length. Where ``k`` has no null-space part that
      could be scaled (a square weight of full rank, for one), ``W⁺ v`` is lengthened in the same way.
    * ``least_change``: ``k + C⁻¹ Wᵀ (W C⁻¹ Wᵀ)⁻¹ (v − W k)``, of all keys that ``W`` maps to ``v`` the one with the
      least ``(k* − k)ᵀ C (k* − k)``, then brought to the length of ``k``; the output has the direction of ``v`` only.

    A rotation keeps the angles between keys, too: a batch is met exactly only as far as the ``k*`` stand to one another
    as the ``k`` do.

    What is preserved does not change with the weight. Its eigenvectors are computed once per layer; remembered keys
    come on top, see `lit_edit.algebra.krylov`.

    Args:
        preservation: ``λ``, how many tokens' worth of the corpus weighs against one edited key.
        memory: Add the keys of past edits to the preserved set.
        target: How ``k*`` is chosen.
        method: ``krylov``, or ``svd`` of the dense ``p × p`` matrix at every edit. Their objectives agree to 1e-9.

    Raises:
        ValueError: if ``preservation`` is not positive, or ``target`` or ``method`` is unknown.
    """

    additive = False

    def __init__(
        self,
        preservation: float = 1.0,
        memory: bool = True,
        target: Literal["exact", "least_change"] = "exact",
        method: Literal["krylov", "svd"] = "krylov",
    ) -> None:
        super().__init__(memory)
        self.preservation = check_positive(preservation, "MOSEKey's preservation")
        if target not in ("exact", "least_change"):
            raise ValueError(f"The target of MOSEKey is 'exact' or 'least_change', not {target!r}.")
        if method not in ("krylov", "svd"):
            raise ValueError(f"The method of MOSEKey is 'krylov' or 'svd', not {method!r}.")
        self.target, self.method = target, method

    def _solve(self, site: EditedWeight, keys: Tensor, targets: Tensor, value_keys: Tensor | None) -> Rotation:
        if not keys.any(dim=0).all():
            raise UnwritableError(f"A key of layer {site.name!r} is zero: no rotation can move its output.")
        covariance = self.covariance(site).detach()
        if self.target == "exact":
            wanted = self._matched(site, keys, targets)
        else:
            wanted = least_changed_keys(site.exact.dense(), keys, targets, covariance.to(keys))
        if self.method == "svd" or 60 * keys.shape[1] >= len(keys):  # a space for this many keys would fill the whole
            remembered = self.remembered(site).to(keys)
            m = torch.addmm(self.preservation * covariance.to(keys), remembered, remembered.T)
            return Rotation(procrustes(m.addmm_(wanted, keys.T)), of_keys=True)
        solution = procrustes_near_identity(self._preserved(site), wanted, keys)
        return Rotation(solution.turn, solution.basis, of_keys=True)

    def _preserved(self, site: EditedWeight) -> Preserved:
        """``λ C + M Mᵀ`` by its eigenvectors, grown key by key."""
        kept, remembered = site.kept.get(_NAME), self.remembered(site)
        if not isinstance(kept, _Eigenvectors) or not kept.fits(site, self.preservation, remembered):
            base = Preserved.of(self.preservation * self.covariance(site).to(site.device, torch.float64))
            kept = _Eigenvectors(self.preservation, base, 0, site.forgotten)
        kept = site.kept[_NAME] = kept.with_all(remembered, site)
        return kept.preserved

    def _matched(self, site: EditedWeight, keys: Tensor, targets: Tensor) -> Tensor:
        """`matched_keys` with the triangle kept: turning keys leaves ``W Wᵀ`` as it is but for rounding."""
        weight, outputs = site.exact, torch.cat([targets, site.exact @ keys], dim=1)
        kept = site.kept.get(_TRIANGLE)
        rows = None if kept is None else _refined(weight, outputs, kept["triangle"])
        if rows is None:
            fresh = _triangle(weight.dense())
            if fresh is None:
                return matched_keys(weight.dense(), keys, targets)
            site.kept[_TRIANGLE] = {"triangle": fresh}  # for the checkpoint: anew it would differ in the last bits
            rows = _refined(weight, outputs, fresh)
        if rows is None:
            rows = torch.linalg.pinv(weight.dense()) @ outputs
        return _matched(keys, targets, rows)

    def kept_size(self, d: int, p: int) -> int:
        """A triangle and, with ``method="krylov"``, the eigenvectors and what stands beside them."""
        return d * d + (0 if self.method == "svd" else p * (p + FOLD_AT))


@dataclass(frozen=True, eq=False)
class _Eigenvectors:
    """``λ C + M Mᵀ`` by eigenvectors, with the number of keys remembered in it."""

    preservation: float
    preserved: Preserved
    known: int
    forgotten: int

    def fits(self, site: EditedWeight, preservation: float, remembered: Tensor) -> bool:
        same_keys = self.known <= remembered.shape[1] and self.forgotten == site.forgotten
        return self.preservation == preservation and (not self.known or same_keys)

    def with_all(self, remembered: Tensor, site: EditedWeight) -> _Eigenvectors:
        # One by one, so that the result does not depend, to the last bit, on how many came at once: a run that goes on
        # from a checkpoint gets all of them together.
        preserved = self.preserved
        for column in remembered[:, self.known :].to(preserved.values).T:
            preserved = preserved.with_columns(column[:, None])
            if preserved.factor.shape[1] >= FOLD_AT:
                preserved = preserved.folded()
        return replace(self, preserved=preserved, known=remembered.shape[1], forgotten=site.forgotten)


def matched_keys(weight: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
    """Keys of the same lengths that the weight maps to the targets, or to their directions where it cannot.

    Args:
        weight: ``W (d, p)``.
        keys: ``K (p, n)``, none of them zero.
        targets: ``V (d, n)``.

    Returns:
        ``K* (p, n)`` as described for ``exact`` in `MOSEKey`.
    """
    outputs = torch.cat([targets, weight @ keys], dim=1)
    triangle = _triangle(weight)
    rows = None if triangle is None else _refined(ExactWeight(weight), outputs, triangle)
    return _matched(keys, targets, torch.linalg.pinv(weight) @ outputs if rows is None else rows)


def _matched(keys: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    """`matched_keys` from the parts in the row space of ``W`` that targets and outputs come from, (p, 2 n)."""
    lengths = keys.norm(dim=0)
    row, present = rows.chunk(2, dim=1)
    null = keys - present
    reached, free = row.norm(dim=0), null.norm(dim=0)
    scale = (lengths**2 - reached**2).clamp(min=0).sqrt() / free
    exact = row + null * scale
    # A target of zero length in a weight without null space asks for a key that does not exist: leave its key alone.
    direction = torch.where(reached > _NOTHING * lengths, row * (lengths / reached), keys)
    return torch.where((reached <= lengths) & (free > _NOTHING * lengths), exact, direction)


def _triangle(weight: Tensor) -> Tensor | None:
    """``L`` with ``L Lᵀ = W Wᵀ``, from a QR factorisation of ``Wᵀ``; None unless ``W`` has full row rank."""
    d, p = weight.shape
    if d > p:
        return None
    lower = torch.linalg.qr(weight.T, mode="r").R.T
    pivots = lower.diagonal().abs()
    return lower if float(pivots.min()) > p * torch.finfo(weight.dtype).eps * float(pivots.max()) else None


def _refined(weight: ExactWeight, outputs: Tensor, triangle: Tensor) -> Tensor | None:
    """``W⁺ outputs = Wᵀ (W Wᵀ)⁻¹ outputs``, corrected until ``W`` gives the outputs; None if it does not come to that.

    The triangle may be that of a weight before rounding.
    """
    found = weight.back(solve_factored(triangle, outputs))
    size = torch.linalg.vector_norm(outputs)
    for _ in range(_CORRECTIONS):
        left = outputs - weight @ found
        if bool(torch.linalg.vector_norm(left) <= _EXACT * size):
            return found
        found = found + weight.back(solve_factored(triangle, left))
    return None


def least_changed_keys(weight: Tensor, keys: Tensor, targets: Tensor, covariance: Tensor) -> Tensor:
    """Keys of the same lengths that the weight maps to the targets' directions, moved where the corpus has least.

    Args:
        weight: ``W (d, p)``, of full row rank.
        keys: ``K (p, n)``, none of them zero.
        targets: ``V (d, n)``.
        covariance: ``C (p, p)``.

    Returns:
        ``K* (p, n)`` as described for ``least_change`` in `MOSEKey`.

    Raises:
        NotPositiveDefiniteError: if the covariance is singular or the weight's rows depend on one another.
    """
    spread = solve_spd(covariance, weight.T)
    moved = keys + spread @ solve_spd(weight @ spread, targets - weight @ keys)
    return moved * (keys.norm(dim=0) / moved.norm(dim=0))
