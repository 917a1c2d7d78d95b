"""MEMIT: a batch of facts by regularised least squares."""

from __future__ import annotations

import torch

from lit_edit.algebra.linalg import NotPositiveDefiniteError, solve_spd
from lit_edit.algebra.updates import LowRank
from lit_edit.editors.solvers.base import Problem, Solver, check_positive, preserved_gram
from lit_edit.editors.solvers.kept import room_for_keys


class MEMIT(Solver):
    r"""Least-squares edit of a batch (MEMIT, Meng et al. 2023, Eq. 14).

    .. math:: ΔW = R K^\top (λ C + M M^\top + K K^\top)^{-1}

    minimises ``λ ‖ΔW C^½‖² + ‖ΔW M‖² + ‖ΔW K − R‖²`` with the residual ``R = V − W K``. How it is spread over several
    layers is the editor's business.

    Args:
        preservation: ``λ``, how many tokens' worth of the corpus weighs against one edited key.
        memory: add the keys of past edits, ``M``, to the preserved set; the paper has none.

    Raises:
        ValueError: if ``preservation`` is not positive.
    """

    def __init__(self, preservation: float = 15000.0, memory: bool = False) -> None:
        super().__init__(memory)
        self.preservation = check_positive(preservation, "MEMIT's preservation")

    def kept_size(self, d: int, p: int) -> int:
        """The factor of the key covariance, and room for remembered keys."""
        return p * p + (room_for_keys(p) if self.use_memory else 0)

    @torch.no_grad()
    def solve(self, problem: Problem) -> LowRank:
        """The update, of rank ``n`` at most.

        Raises:
            ValueError: if the covariance is missing.
            NotPositiveDefiniteError: if the matrix to invert is singular.
        """
        keys, remembered = problem.keys, self.remembered(problem)
        try:
            # (G + K Kᵀ)⁻¹ K = G⁻¹ K (I + Kᵀ G⁻¹ K)⁻¹ with G = λ C + M Mᵀ.
            whitened = self.preserved(problem, self.preservation).solve(keys)
        except NotPositiveDefiniteError:
            # Few tokens leave G singular; the keys themselves may still make the sum definite.
            gram = preserved_gram(self.covariance(problem), remembered, self.preservation)
            return LowRank(left=problem.residual, right=solve_spd(gram.addmm_(keys, keys.T), keys).T)
        inner = keys.T @ whitened
        inner = (inner + inner.T) / 2
        inner.diagonal().add_(1.0)
        return LowRank(left=problem.residual, right=solve_spd(inner, whitened.T))
