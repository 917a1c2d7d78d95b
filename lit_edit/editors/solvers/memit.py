"""MEMIT: a batch of facts by regularised least squares."""

from __future__ import annotations

from torch import Tensor

from lit_edit.algebra.linalg import NotPositiveDefiniteError, solve_spd
from lit_edit.algebra.updates import LowRank
from lit_edit.editors.solvers.base import Solver, check_positive, preserved_gram, residual
from lit_edit.editors.solvers.preserved import room_for_keys
from lit_edit.model.edited_weight import EditedWeight


class MEMIT(Solver):
    r"""Least-squares edit of a batch (MEMIT, Meng et al. 2023, Eq. 14).

    .. math:: ΔW = R K^\top (λ C + M M^\top + K K^\top)^{-1}

    minimises ``λ ‖ΔW C^½‖² + ‖ΔW M‖² + ‖ΔW K − R‖²`` with the residual ``R = V − W K``. How it is spread over several
    layers is the editor's business.

    Args:
        preservation: ``λ``, how many tokens' worth of the corpus weighs against one edited key.
        memory: Add the keys of past edits, ``M``, to the preserved set; the paper has none.

    Raises:
        ValueError: if ``preservation`` is not positive.
    """

    def __init__(self, preservation: float = 15000.0, memory: bool = False) -> None:
        super().__init__(memory)
        self.preservation = check_positive(preservation, "MEMIT's preservation")

    def kept_size(self, d: int, p: int) -> int:
        """The factor of the key covariance, and room for remembered keys."""
        return p * p + (room_for_keys(p) if self.use_memory else 0)

    def _solve(self, site: EditedWeight, keys: Tensor, targets: Tensor, value_keys: Tensor | None) -> LowRank:
        missing = residual(site, keys, targets, value_keys)
        try:
            # (G + K Kᵀ)⁻¹ K = G⁻¹ K (I + Kᵀ G⁻¹ K)⁻¹ with G = λ C + M Mᵀ.
            whitened = self.preserved(site, self.preservation).solve(keys)
        except NotPositiveDefiniteError:
            # Few tokens leave G singular; the keys themselves may still make the sum definite.
            gram = preserved_gram(self.covariance(site), self.remembered(site), self.preservation)
            return LowRank(missing, solve_spd(gram.addmm_(keys, keys.T), keys).T)
        inner = keys.T @ whitened
        inner = (inner + inner.T) / 2
        inner.diagonal().add_(1.0)
        return LowRank(missing, solve_spd(inner, whitened.T))
