"""EMMET: a batch of facts, every one of them written exactly, with the least change to everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_edit.algebra.linalg import solve_spd
from lit_edit.algebra.updates import LowRank, UnwritableError
from lit_edit.editors.solvers.base import Solver, check_positive, residual
from lit_edit.editors.solvers.preserved import room_for_keys
from lit_edit.model.edited_weight import EditedWeight

# Of the keys' Gram matrix in G⁻¹, scaled to a unit diagonal: with less, two facts stand on what float32 rounding left
# of the difference between their keys.
_INDEPENDENT = 1e-10


class EMMET(Solver):
    r"""Batched edit under equality constraints (EMMET; Gupta et al. 2024, *A Unified Framework for Model Editing*).

    .. math:: ΔW = R\, (K^\top G^{-1} K + ρ I)^{-1} K^\top G^{-1}, \qquad G = λ C + M M^\top

    With ``ρ = 0`` it is, of all changes with ``(W + ΔW) K = V``, the one of least ``tr(ΔW G ΔWᵀ)``: ROME for ``n`` keys
    at once, and ROME itself for one. With ``ρ > 0`` it minimises ``tr(ΔW G ΔWᵀ) + ‖ΔW K − R‖² / ρ`` instead, which is
    MEMIT's objective with preservation ``ρλ`` (its own memory weighs ``ρ`` likewise).

    Args:
        preservation: ``λ``, the weight of ``C`` against the memory and against ``ridge``, in tokens. With neither it
            cancels.
        ridge: ``ρ``, on the scale of ``kᵀ G⁻¹ k``; 0 in the paper, 0.1 in its released code. It is for keys that depend
            on one another, and as released plays no part where there is one only.
        memory: Add the keys of past edits, ``M``, to the preserved set; the paper has none.

    Raises:
        ValueError: if ``preservation`` is not positive or ``ridge`` is negative.
    """

    def __init__(self, preservation: float = 1.0, ridge: float = 0.0, memory: bool = False) -> None:
        super().__init__(memory)
        self.preservation = check_positive(preservation, "EMMET's preservation")
        self.ridge = check_positive(ridge, "EMMET's ridge") if ridge else 0.0

    def kept_size(self, d: int, p: int) -> int:
        """The factor of the key covariance, and room for remembered keys."""
        return p * p + (room_for_keys(p) if self.use_memory else 0)

    def _solve(self, site: EditedWeight, keys: Tensor, targets: Tensor, value_keys: Tensor | None) -> LowRank:
        if not keys.any(dim=0).all():
            raise UnwritableError(f"A key of layer {site.name!r} is zero: no change of the weight can move its output.")
        whitened = self.whitened_keys(site, keys, self.preservation)
        inner = keys.T @ whitened
        inner = (inner + inner.T) / 2
        if keys.shape[1] > 1:
            inner.diagonal().add_(self.ridge)
        self._check_independent(inner, site.name)
        return LowRank(residual(site, keys, targets, value_keys), solve_spd(inner, whitened.T))

    @staticmethod
    def _check_independent(inner: Tensor, layer: str) -> None:
        n, scale = len(inner), inner.diagonal().rsqrt()
        smallest = float(torch.linalg.eigvalsh(scale[:, None] * inner * scale)[0])
        if not smallest > n * _INDEPENDENT:
            raise ValueError(
                f"The {n} keys of layer {layer!r} depend on one another (smallest eigenvalue of their Gram matrix "
                f"{smallest:.1e}, scaled to a unit diagonal), so that they cannot all be given outputs of their own; "
                "requests with the same text up to the end of the subject have the same key. Raise EMMET's `ridge`, or "
                "make batches smaller."
            )
