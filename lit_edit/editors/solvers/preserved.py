"""Systems with what is preserved and all remembered keys, ``B + M Mᵀ``: kept from edit to edit, grown key by key."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lit_edit.algebra.linalg import NotPositiveDefiniteError, cholesky_spd, solve_factored
from lit_edit.model.edited_weight import EditedWeight

FOLD_AT = 64  # remembered keys beside what is kept, at least; and never fewer than a sixteenth of the key's size


@dataclass(frozen=True, eq=False)
class Grown(ABC):
    """``B⁻¹`` in some form and, by the Woodbury identity, what the remembered keys that came since change in it.

    With ``F`` those keys, a system takes O(p²) operations per right-hand side and O(p f) for ``f`` of them, and a new
    key the same. Once they are a sixteenth of ``p`` they go into ``B``, so that neither grows without bound.

    Keys come in one by one, and go into ``B`` at set counts: the result does not depend, to the last bit, on how many
    came at once. A run that goes on from a checkpoint gets all of them together.

    Args:
        known: Number of remembered keys, those in ``B`` included.
        forgotten: `EditedWeight.forgotten` when the first of them came in.
        fresh: ``F (p, f)``, those that are not in ``B`` yet.
        solved: ``B⁻¹ F (p, f)``.
        inner: Lower Cholesky factor of ``I + Fᵀ B⁻¹ F``, ``(f, f)``.
    """

    known: int
    forgotten: int
    fresh: Tensor
    solved: Tensor
    inner: Tensor

    @abstractmethod
    def alone(self, x: Tensor) -> Tensor:
        """``B⁻¹ x``, for ``x (p, n)``."""

    @abstractmethod
    def folded(self) -> Self:
        """With the fresh keys in ``B``."""

    def fits(self, site: EditedWeight, remembered: Tensor) -> bool:
        """Whether the layer's remembered keys ``(p, m)``, as many as the solver counts, only grew since."""
        return not self.known or (self.known <= remembered.shape[1] and self.forgotten == site.forgotten)

    def with_all(self, remembered: Tensor, site: EditedWeight) -> Self:
        """With the keys that have come since, of all remembered ones ``(p, m)``."""
        grown = self
        for column in remembered[:, self.known :].to(self.fresh).T:
            grown = grown._with(column[:, None])
        return replace(grown, known=remembered.shape[1], forgotten=site.forgotten)

    def _with(self, column: Tensor) -> Self:
        solved = self.alone(column)
        # One more row of the Cholesky factor.
        row = torch.linalg.solve_triangular(self.inner, self.solved.T @ column, upper=False)
        pivot = 1.0 + column.T @ solved - row.T @ row
        n = len(self.inner)
        inner = self.inner.new_zeros(n + 1, n + 1)
        inner[:n, :n], inner[n:, :n], inner[n:, n:] = self.inner, row.T, pivot.clamp_min(1.0).sqrt()
        grown = replace(
            self,
            fresh=torch.cat([self.fresh, column], dim=1),
            solved=torch.cat([self.solved, solved], dim=1),
            inner=inner,
        )
        # Should it be refused, it is tried again at twice as many.
        return grown.folded() if (n + 1) % max(FOLD_AT, len(column) // 16) == 0 else grown

    def solve(self, x: Tensor) -> Tensor:
        """``(B + M Mᵀ)⁻¹ x``, for ``x (p, n)``."""
        alone = self.alone(x)
        if not self.fresh.shape[1]:
            return alone
        return alone - self.solved @ solve_factored(self.inner, self.fresh.T @ alone)


@dataclass(frozen=True, eq=False)
class PreservedGram(Grown):
    """``B = λ C``, and the keys that went into it, by its Cholesky factor.

    Args:
        preservation: ``λ``.
        factor: Lower Cholesky factor of ``B``, ``(p, p)``.
    """

    preservation: float
    factor: Tensor

    @classmethod
    def of(cls, covariance: Tensor, preservation: float, site: EditedWeight) -> PreservedGram:
        """Without remembered keys.

        Raises:
            NotPositiveDefiniteError: If ``C`` is singular.
        """
        covariance = covariance.detach().to(device=site.device, dtype=torch.float64)
        return cls(*_no_keys(site), preservation, cholesky_spd(preservation * covariance))

    def alone(self, x: Tensor) -> Tensor:
        """``B⁻¹ x``, for ``x (p, n)``."""
        return solve_factored(self.factor, x)

    def folded(self) -> PreservedGram:
        """With the fresh keys in ``B``; as it is where the sum is too ill-conditioned to be factorised."""
        gram = torch.addmm(self.factor @ self.factor.T, self.fresh, self.fresh.T)
        try:
            factor = cholesky_spd(gram)
        except NotPositiveDefiniteError:  # the identity of Woodbury asks for less
            return self
        none = self.fresh[:, :0].clone()
        return replace(self, factor=factor, fresh=none, solved=none, inner=none.T @ none)


@dataclass(frozen=True, eq=False)
class PreservedNullSpace(Grown):
    """``B = ridge · I`` within the range of an orthogonal projector ``P``, as the dense ``P B⁻¹ P``.

    What is remembered are keys ``k`` whose part ``P k`` counts; solutions lie in the range of ``P``.

    Args:
        projector: ``P (p, p)``.
        ridge: As above.
        inverse: ``ridge P B⁻¹ P``, ``(p, p)``; ``P`` until keys go in.
        chosen_by: Settings that ``P`` and the ridge follow from.
    """

    projector: Tensor
    ridge: float
    inverse: Tensor
    chosen_by: tuple[float | None, ...] = ()

    @classmethod
    def of(
        cls, projector: Tensor, ridge: float, site: EditedWeight, chosen_by: tuple[float | None, ...]
    ) -> PreservedNullSpace:
        """Without remembered keys."""
        return cls(*_no_keys(site), projector, ridge, projector, chosen_by)

    def alone(self, x: Tensor) -> Tensor:
        """``P B⁻¹ P x``, for ``x (p, n)``."""
        return self.inverse @ x / self.ridge

    def folded(self) -> PreservedNullSpace:
        """With the fresh keys in ``B``."""
        half = torch.linalg.solve_triangular(self.inner, self.solved.T, upper=False)
        none = self.fresh[:, :0].clone()
        inverse = torch.addmm(self.inverse, half.T, half, alpha=-self.ridge)
        return replace(self, inverse=inverse, fresh=none, solved=none, inner=none.T @ none)


def _no_keys(site: EditedWeight) -> tuple[int, int, Tensor, Tensor, Tensor]:
    none = torch.empty(site.shape[1], 0, dtype=torch.float64, device=site.device)
    return 0, site.forgotten, none, none, none.T @ none


def room_for_keys(p: int) -> int:
    """Numbers kept at most beside ``B`` for remembered keys of size ``p``."""
    return 2 * p * max(FOLD_AT, p // 16)
