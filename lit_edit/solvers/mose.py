"""MOSE: multiply the weight by the orthogonal matrix that fits old and new knowledge best."""

from __future__ import annotations

import torch

from lit_edit.linalg import procrustes
from lit_edit.solvers.base import Problem, Solver, check_positive
from lit_edit.updates import Rotation


class MOSE(Solver):
    r"""Multiplicative orthogonal edit, ``W ← Q W`` (MOSE, Eq. 15-20).

    Under the constraint ``Qᵀ Q = I`` (Eq. 15) it minimises

    .. math:: λ\, E‖Q W k - W k‖^2 + ‖Q W M - W M‖^2 + ‖Q W K - V‖^2

    over the tokens of a corpus, the keys ``M`` of past edits and the keys ``K`` of this batch (Eq. 16-17; ``M`` is an
    addition). That is the orthogonal Procrustes problem ``min ‖Q A − B‖`` (Eq. 18; Schönemann 1966) with

    .. math:: B A^\top = λ W C W^\top + (W M)(W M)^\top + V (W K)^\top = U Σ H^\top, \qquad Q = U H^\top

    (Eq. 19-20). Norms, singular values and condition number of ``W`` do not change. Because ``Q`` preserves lengths
    too, only targets as long as the present outputs, ``‖v‖ = ‖W k‖``, can be reached: optimise them on that sphere.

    Args:
        preservation: ``λ``, how many tokens' worth of the corpus weighs against one edited key.
        memory: add the keys of past edits to the preserved set. The paper has none; without them later rotations turn
            earlier edits away.

    Raises:
        ValueError: if ``preservation`` is not positive.
    """

    additive = False

    def __init__(self, preservation: float = 1.0, memory: bool = True) -> None:
        super().__init__(memory)
        self.preservation = check_positive(preservation, "MOSE's preservation")

    @torch.no_grad()
    def solve(self, problem: Problem) -> Rotation:
        """The rotation ``Q (d, d)``, by a dense SVD of a ``d × d`` matrix.

        Raises:
            ValueError: if the covariance is missing.
        """
        weight = problem.weight
        covariance = self.covariance(problem).detach().to(weight)
        remembered = weight @ self.remembered(problem)
        m = self.preservation * (weight @ covariance @ weight.T)
        m.addmm_(remembered, remembered.T)
        m.addmm_(problem.targets, (weight @ problem.keys).T)
        return Rotation(procrustes(m))
