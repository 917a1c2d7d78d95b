"""Two-sided rotations: the matrix with W's own singular values that is nearest to a least-squares edit."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_edit.algebra.linalg import solve_spd
from lit_edit.algebra.updates import Additive
from lit_edit.editors.solvers.base import Solver, check_positive
from lit_edit.editors.solvers.preserved import room_for_keys
from lit_edit.model.edited_weight import EditedWeight


class Isospectral(Solver):
    r"""``W ← Q_L W Q_R`` with orthogonal ``Q_L (d, d)`` and ``Q_R (p, p)``: every matrix with the singular values of W.

    Left MOSE and key-side MOSE are the two faces of this set. Its member nearest to a matrix ``U Σ Vᵀ`` is
    ``U Σ_0 Vᵀ`` with the singular values ``Σ_0`` of ``W_0`` (von Neumann's trace inequality). That is done to the
    result of MEMIT's least squares, and what is then missing of the targets is fed back:

    .. math:: W ← \mathrm{nearest}\bigl(W + (V - W K) K^\top (λ C + M M^\top + K K^\top)^{-1}\bigr)

    Targets longer than ``W k`` come within reach of a turn on either side. Takes an SVD of ``(d, p)`` for every round.

    Args:
        preservation: ``λ``, how many tokens' worth of the corpus weighs against one edited key.
        memory: Add the keys of past edits, ``M``, to the preserved set.
        rounds: Times that the step is made.

    Raises:
        ValueError: If ``preservation`` is not positive or there is no round.
    """

    additive = False

    def __init__(self, preservation: float = 1.0, memory: bool = True, rounds: int = 6) -> None:
        super().__init__(memory)
        self.preservation = check_positive(preservation, "Isospectral's preservation")
        if rounds < 1:
            raise ValueError(f"Isospectral needs at least one round, not {rounds}.")
        self.rounds = rounds

    def kept_size(self, d: int, p: int) -> int:
        """The factor of the key covariance, and room for remembered keys."""
        return p * p + (room_for_keys(p) if self.use_memory else 0)

    def _solve(self, site: EditedWeight, keys: Tensor, targets: Tensor, value_keys: Tensor | None) -> Additive:
        start = site.exact.dense()
        original = site.original.to(site.device, torch.float64)
        values = site.derived("singular values", lambda: torch.linalg.svdvals(original))
        whitened = self.whitened_keys(site, keys, self.preservation)
        inner = keys.T @ whitened
        inner = (inner + inner.T) / 2
        inner.diagonal().add_(1.0)
        right = solve_spd(inner, whitened.T)
        weight = start
        for _ in range(self.rounds):
            u, _, vt = torch.linalg.svd(weight + (targets - weight @ keys) @ right, full_matrices=False)
            weight = (u * values) @ vt
        return Additive(weight - start)
