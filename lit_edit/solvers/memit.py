"""MEMIT: a batch of facts by regularised least squares."""

from __future__ import annotations

import torch

from lit_edit.linalg import solve_spd
from lit_edit.solvers.base import Problem, Solver, check_positive, preserved_gram
from lit_edit.updates import LowRank


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

    @torch.no_grad()
    def solve(self, problem: Problem) -> LowRank:
        """The update, of rank ``n`` at most.

        Raises:
            ValueError: if the covariance is missing.
            NotPositiveDefiniteError: if the matrix to invert is singular.
        """
        gram = preserved_gram(self.covariance(problem), self.remembered(problem), self.preservation)
        gram.addmm_(problem.keys, problem.keys.T)
        return LowRank(left=problem.residual, right=solve_spd(gram, problem.keys).T)
