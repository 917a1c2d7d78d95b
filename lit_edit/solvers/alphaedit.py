"""AlphaEdit: least squares inside the null space of the preserved keys."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_edit.linalg import check_null_space_choice, null_space_projector, solve_spd
from lit_edit.solvers.base import Problem, Solver, check_positive
from lit_edit.updates import LowRank


class AlphaEdit(Solver):
    r"""Null-space constrained edit (AlphaEdit, Fang et al. 2025; its closed form with a weight on the ridge).

    .. math:: ΔW^\top = (P (K K^\top + M M^\top) + L_2 I)^{-1} P K R^\top

    ``P`` projects on the directions that the keys of a corpus hardly use, ``M`` holds the keys of past edits. Outputs
    of keys orthogonal to the range of ``P`` do not move at all.

    ``P`` needs an eigendecomposition per layer. It is kept for as long as the layer comes with the very same covariance
    tensor, not changed in place since.

    Args:
        threshold: eigenvectors of ``C`` with an eigenvalue below this span the null space; in squared activations, so
            it depends on the model's scale. Set it to null to choose by ``energy``.
        energy: the share of the trace of ``C`` that the null space may hold at most, an alternative to ``threshold``.
        ridge: ``L2``, the weight of ``‖ΔW‖²``: 10 in the paper's code, 1 in some configs for larger models.
        memory: keep the keys of past edits, as the paper does.

    Raises:
        ValueError: unless ``ridge`` is positive and exactly one of ``threshold`` and ``energy`` is given, in range.
    """

    def __init__(
        self,
        threshold: float | None = 2e-2,
        energy: float | None = None,
        ridge: float = 10.0,
        memory: bool = True,
    ) -> None:
        super().__init__(memory)
        check_null_space_choice(threshold, energy)  # here already, so that a bad config fails before any work
        self.threshold, self.energy = threshold, energy
        self.ridge = check_positive(ridge, "AlphaEdit's ridge")
        self._projectors: dict[str, _Projector] = {}

    @torch.no_grad()
    def solve(self, problem: Problem) -> LowRank:
        """The update, of rank ``n`` at most.

        Raises:
            ValueError: if the covariance is missing or its null space is empty.
        """
        projector = self.projector(problem)
        keys, n = problem.keys, problem.keys.shape[1]
        # ΔWᵀ = X Rᵀ where X lies in the range of P, so P S P may stand for P S: with A = P [K M] the system to solve is
        # (A Aᵀ + L₂ I) X = P K. It is symmetric and, by (A Aᵀ + L₂ I)⁻¹ A = A (Aᵀ A + L₂ I)⁻¹, as small as the smaller
        # side of A.
        a = projector @ torch.cat([keys, self.remembered(problem)], dim=1)
        p, columns = a.shape
        if columns < p:
            gram = a.T @ a
            gram.diagonal().add_(self.ridge)
            chosen = torch.eye(columns, dtype=a.dtype, device=a.device)[:, :n]
            x = a @ solve_spd(gram, chosen)
        else:
            gram = a @ a.T
            gram.diagonal().add_(self.ridge)
            x = solve_spd(gram, a[:, :n])
        return LowRank(left=problem.residual, right=x.T)

    def check_covariance(self, covariance: Tensor, layer: str, device: torch.device) -> None:
        """Computes the projector, which the first edit will need anyway.

        Raises:
            ValueError: if the null space is empty.
        """
        self._projector(covariance, layer, device)

    def kept_size(self, d: int, p: int) -> int:
        """The projector."""
        return p * p

    def projector(self, problem: Problem) -> Tensor:
        """``P (p, p)`` in float64 for the problem's layer, computed once per covariance.

        Raises:
            ValueError: if the covariance is missing or its null space is empty.
        """
        return self._projector(self.covariance(problem), problem.layer, problem.weight.device)

    def _projector(self, covariance: Tensor, layer: str, device: torch.device) -> Tensor:
        kept = self._projectors.get(layer)
        if kept is None or not kept.belongs_to(covariance):
            matrix, dimension = null_space_projector(
                covariance.to(device), threshold=self.threshold, energy=self.energy
            )
            if not dimension:
                raise ValueError(self._no_null_space(covariance, layer))
            kept = self._projectors[layer] = _Projector(covariance, matrix)
        return kept.matrix.to(device)

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


class _Projector:
    """A null-space projector with the covariance it came from.

    The covariance is held, not just its address, which another tensor may be given once it is freed.
    """

    def __init__(self, covariance: Tensor, matrix: Tensor) -> None:
        self.covariance, self.version, self.matrix = covariance, _version(covariance), matrix

    def belongs_to(self, covariance: Tensor) -> bool:
        return covariance is self.covariance and _version(covariance) == self.version


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; inference tensors do not count and cannot be changed by mistake."""
    return 0 if tensor.is_inference() else tensor._version
