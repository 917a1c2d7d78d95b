"""AlphaEdit: least squares inside the null space of the preserved keys."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_edit.algebra.linalg import check_null_space_choice, null_space_projector, solve_spd
from lit_edit.algebra.updates import LowRank
from lit_edit.editors.solvers.base import Solver, check_positive, residual
from lit_edit.editors.solvers.preserved import PreservedNullSpace, room_for_keys
from lit_edit.model.edited_weight import EditedWeight

_NAME = "AlphaEdit.null_space"  # of what is kept for a layer


class AlphaEdit(Solver):
    r"""Null-space constrained edit (AlphaEdit, Fang et al. 2025; its closed form with a weight on the ridge).

    .. math:: ΔW^\top = (P (K K^\top + M M^\top) + L_2 I)^{-1} P K R^\top

    ``P`` projects on the directions that the keys of a corpus hardly use, ``M`` holds the keys of past edits. Outputs
    of keys orthogonal to the range of ``P`` do not move at all.

    ``P`` needs an eigendecomposition, once per layer.

    Args:
        threshold: Eigenvectors of ``C`` with an eigenvalue below this span the null space; in squared activations, so
            it depends on the model's scale. Set it to null to choose by ``energy``.
        energy: Share of the trace of ``C`` that the null space may hold at most, an alternative to ``threshold``.
        ridge: ``L2``, the weight of ``‖ΔW‖²``: 10 in the paper's code, 1 in some configs for larger models.
        ridge_unit: ``absolute`` as published, or ``energy``: a multiple of the layer's mean ``‖k‖²`` over the corpus,
            the trace of ``C``. Keys grow from layer to layer, so that one absolute ridge means another thing in each.
        memory: Keep the keys of past edits, as the paper does.

    Raises:
        ValueError: unless ``ridge`` is positive and exactly one of ``threshold`` and ``energy`` is given, in range.
    """

    def __init__(
        self,
        threshold: float | None = 2e-2,
        energy: float | None = None,
        ridge: float = 10.0,
        memory: bool = True,
        ridge_unit: Literal["absolute", "energy"] = "absolute",
    ) -> None:
        super().__init__(memory)
        if ridge_unit not in ("absolute", "energy"):
            raise ValueError(f"The unit of AlphaEdit's ridge is 'absolute' or 'energy', not {ridge_unit!r}.")
        check_null_space_choice(threshold, energy)  # here already, so that a bad config fails before any work
        self.threshold, self.energy = threshold, energy
        self.ridge, self.ridge_unit = check_positive(ridge, "AlphaEdit's ridge"), ridge_unit

    def _solve(self, site: EditedWeight, keys: Tensor, targets: Tensor, value_keys: Tensor | None) -> LowRank:
        kept = self._null_space(site).with_all(self.remembered(site), site)
        site.kept[_NAME] = kept
        # ΔWᵀ = X Rᵀ where X lies in the range of P, so P S P may stand for P S. With B = L₂ I + P M Mᵀ P the system to
        # solve is (B + P K Kᵀ P) X = P K, and X = B⁻¹ P K (I + Kᵀ P B⁻¹ P K)⁻¹.
        x = kept.solve(keys)
        inner = keys.T @ x
        inner = (inner + inner.T) / 2
        inner.diagonal().add_(1.0)
        return LowRank(residual(site, keys, targets, value_keys), solve_spd(inner, x.T))

    def check(self, site: EditedWeight) -> None:
        """Computes the projector, which the first edit will need anyway.

        Raises:
            ValueError: If the covariance is missing or its null space is empty.
        """
        self._null_space(site)

    def kept_size(self, d: int, p: int) -> int:
        """The projector, what remembered keys make of it, and the last of them as they are and solved for."""
        return 2 * p * p + room_for_keys(p) if self.use_memory else p * p

    def projector(self, site: EditedWeight) -> Tensor:
        """``P (p, p)`` in float64, computed once per layer.

        Raises:
            ValueError: If the covariance is missing or its null space is empty.
        """
        return self._null_space(site).projector

    def _null_space(self, site: EditedWeight) -> PreservedNullSpace:
        covariance = self.covariance(site)
        ridge = self.ridge
        if self.ridge_unit == "energy":
            ridge *= float(covariance.diagonal().double().sum())
        known, chosen_by = site.kept.get(_NAME), (self.threshold, self.energy, ridge)
        if isinstance(known, PreservedNullSpace) and known.chosen_by == chosen_by:
            if known.fits(site, self.remembered(site)):
                return known
            projector = known.projector
        else:
            projector, dimension = null_space_projector(
                covariance.to(site.device), threshold=self.threshold, energy=self.energy
            )
            if not dimension:
                raise ValueError(self._no_null_space(covariance, site.name))
        known = site.kept[_NAME] = PreservedNullSpace.of(projector, ridge, site, chosen_by)
        return known

    def _no_null_space(self, covariance: Tensor, layer: str) -> str:
        values = torch.linalg.eigvalsh(covariance.detach().to(torch.float64))
        smallest = float(values[0])
        found = (
            f"AlphaEdit finds no null space in layer {layer!r}: the smallest of {len(values)} eigenvalues of the key "
        )
        if self.energy is None:
            return (
                f"{found}covariance is {smallest:.3g}, the threshold {self.threshold:.3g}. Raise the threshold, or set "
                "it to null and give `energy`, a share of the trace, which does not depend on the model's scale."
            )
        return (
            f"{found}covariance is {smallest:.3g}, already {smallest / float(values.sum()):.2g} of their sum. Raise "
            f"`energy`, now {self.energy:.3g}."
        )
