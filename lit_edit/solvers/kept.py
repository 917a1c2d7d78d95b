"""Systems with the Gram matrix of what is preserved, ``λ C + M Mᵀ``: factorised once per layer, not at every edit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_edit.linalg import cholesky_spd, solve_spd


@dataclass(frozen=True, eq=False)
class KeptGram:
    """``λ C + M Mᵀ`` by the Cholesky factor of ``λ C`` and, per remembered key, one solution of a system with it.

    A system with the sum then takes O(p²) operations per right-hand side and O(p m) for ``m`` remembered keys, by the
    Woodbury identity.

    Args:
        covariance: ``C (p, p)``, the tensor itself: solvers know a layer's statistics by identity.
        version: how often it had been changed in place.
        preservation: ``λ``.
        factor: lower Cholesky factor of ``λ C``, ``(p, p)``.
        remembered: ``M (p, m)``.
        solved: ``(λ C)⁻¹ M (p, m)``.
    """

    covariance: Tensor
    version: int
    preservation: float
    factor: Tensor
    remembered: Tensor
    solved: Tensor

    @classmethod
    def of(cls, covariance: Tensor, preservation: float, like: Tensor) -> KeptGram:
        """Without remembered keys.

        Args:
            covariance: ``C (p, p)``.
            preservation: ``λ``.
            like: a tensor (p, n) of the device and dtype to compute in.

        Raises:
            NotPositiveDefiniteError: if ``C`` is singular.
        """
        factor = cholesky_spd(preservation * covariance.detach().to(like))
        return cls(covariance, version_of(covariance), preservation, factor, like[:, :0], like[:, :0])

    def belongs_to(self, covariance: Tensor, preservation: float, remembered: Tensor) -> bool:
        """Whether it is of this covariance and weight, and of the first of these remembered keys."""
        known = self.remembered.shape[1]
        return (
            covariance is self.covariance
            and preservation == self.preservation
            and version_of(covariance) == self.version
            and remembered.device == self.factor.device
            and remembered.shape[1] >= known
            and torch.equal(remembered[:, :known], self.remembered)
        )

    def with_all(self, remembered: Tensor) -> KeptGram:
        """With the keys that have come since."""
        # One by one, so that the result does not depend, to the last bit, on how many came at once: a run that goes on
        # from a checkpoint gets all of them together.
        columns = [
            torch.cholesky_solve(column[:, None], self.factor) for column in remembered[:, self.remembered.shape[1] :].T
        ]
        if not columns:
            return self
        return replace(self, remembered=remembered, solved=torch.cat([self.solved, *columns], dim=1))

    def solve(self, x: Tensor) -> Tensor:
        """``(λ C + M Mᵀ)⁻¹ x``, for ``x (p, n)``."""
        alone = torch.cholesky_solve(x, self.factor)
        if not self.remembered.shape[1]:
            return alone
        inner = self.remembered.T @ self.solved
        inner = (inner + inner.T) / 2
        inner.diagonal().add_(1.0)
        return alone - self.solved @ solve_spd(inner, self.remembered.T @ alone)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; inference tensors do not count and cannot be changed by mistake."""
    return 0 if tensor.is_inference() else tensor._version
