"""Systems with what is preserved and all remembered keys, ``B + M Mᵀ``: kept from edit to edit, grown key by key."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lit_edit.algebra.linalg import (
    NotPositiveDefiniteError,
    cholesky_spd,
    null_space_projector,
    solve_factored,
    version_of,
)

FOLD_AT = 64  # remembered keys beside what is kept, at least; and never fewer than a sixteenth of the key's size


@dataclass(frozen=True, eq=False)
class Kept(ABC):
    """``B⁻¹`` in some form and, by the Woodbury identity, what the remembered keys that came since change in it.

    With ``F`` those keys, a system takes O(p²) operations per right-hand side and O(p f) for ``f`` of them, and a new
    key the same. Once they are a sixteenth of ``p`` they go into ``B``, so that neither grows without bound.

    Keys come in one by one, and go into ``B`` at set counts: the result does not depend, to the last bit, on how many
    came at once. A run that goes on from a checkpoint gets all of them together.

    Args:
        covariance: ``C (p, p)``, the tensor itself: solvers know a layer's statistics by identity.
        version: how often it had been changed in place.
        known: how many keys are remembered, those in ``B`` included.
        marked: a few of them (see `marks`); the solver's problems have them all.
        fresh: ``F (p, f)``, those that are not in ``B`` yet.
        solved: ``B⁻¹ F (p, f)``.
        inner: lower Cholesky factor of ``I + Fᵀ B⁻¹ F``, ``(f, f)``.
    """

    covariance: Tensor
    version: int
    known: int
    marked: Tensor
    fresh: Tensor
    solved: Tensor
    inner: Tensor

    @abstractmethod
    def alone(self, x: Tensor) -> Tensor:
        """``B⁻¹ x``, for ``x (p, n)``."""

    @abstractmethod
    def folded(self) -> Self:
        """With the fresh keys in ``B``."""

    def is_of(self, covariance: Tensor, device: torch.device) -> bool:
        """Whether it is of this covariance as it is now, on this device."""
        return covariance is self.covariance and version_of(covariance) == self.version and device == self.marked.device

    def begins(self, remembered: Tensor) -> bool:
        """Whether its remembered keys are the first of these, as far as a few of them tell."""
        return remembered.shape[1] >= self.known and torch.equal(marks(remembered, self.known), self.marked)

    def with_all(self, remembered: Tensor) -> Self:
        """With the keys that have come since."""
        kept = self
        for column in remembered[:, self.known :].T:
            kept = kept._with(column[:, None])
        m = remembered.shape[1]
        return kept if kept is self else replace(kept, known=m, marked=marks(remembered, m))

    def _with(self, column: Tensor) -> Self:
        solved = self.alone(column)
        # One more row of the Cholesky factor.
        row = torch.linalg.solve_triangular(self.inner, self.solved.T @ column, upper=False)
        pivot = 1.0 + column.T @ solved - row.T @ row
        n = len(self.inner)
        inner = self.inner.new_zeros(n + 1, n + 1)
        inner[:n, :n], inner[n:, :n], inner[n:, n:] = self.inner, row.T, pivot.clamp_min(1.0).sqrt()
        kept = replace(
            self,
            fresh=torch.cat([self.fresh, column], dim=1),
            solved=torch.cat([self.solved, solved], dim=1),
            inner=inner,
        )
        # Should it be refused, it is tried again at twice as many.
        return kept.folded() if (n + 1) % max(FOLD_AT, len(column) // 16) == 0 else kept

    def solve(self, x: Tensor) -> Tensor:
        """``(B + M Mᵀ)⁻¹ x``, for ``x (p, n)``."""
        alone = self.alone(x)
        if not self.fresh.shape[1]:
            return alone
        return alone - self.solved @ solve_factored(self.inner, self.fresh.T @ alone)


@dataclass(frozen=True, eq=False)
class KeptGram(Kept):
    """``B = λ C``, and the keys that went into it, by its Cholesky factor.

    Args:
        preservation: ``λ``.
        factor: lower Cholesky factor of ``B``, ``(p, p)``.
    """

    preservation: float
    factor: Tensor

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
        return cls(covariance, version_of(covariance), *_no_keys(like), preservation, factor)

    def alone(self, x: Tensor) -> Tensor:
        """``B⁻¹ x``, for ``x (p, n)``."""
        return solve_factored(self.factor, x)

    def folded(self) -> KeptGram:
        """With the fresh keys in ``B``; as it is where the sum is too ill-conditioned to be factorised."""
        gram = torch.addmm(self.factor @ self.factor.T, self.fresh, self.fresh.T)
        try:
            factor = cholesky_spd(gram)
        except NotPositiveDefiniteError:  # the identity of Woodbury asks for less
            return self
        none = self.fresh[:, :0].clone()
        return replace(self, factor=factor, fresh=none, solved=none, inner=none.T @ none)


@dataclass(frozen=True, eq=False)
class KeptProjection(Kept):
    """``B = ridge · I`` within the range of an orthogonal projector ``P``, as the dense ``P B⁻¹ P``.

    What is remembered are keys ``k`` whose part ``P k`` counts; solutions lie in the range of ``P``.

    Args:
        projector: ``P (p, p)``.
        ridge: as above.
        inverse: ``ridge P B⁻¹ P``, ``(p, p)``; ``P`` until keys go in.
        chosen_by: the threshold and the energy that ``P`` was chosen by.
    """

    projector: Tensor
    ridge: float
    inverse: Tensor
    chosen_by: tuple[float | None, float | None] = (None, None)

    @classmethod
    def of(
        cls, covariance: Tensor, ridge: float, like: Tensor, *, threshold: float | None, energy: float | None
    ) -> KeptProjection | None:
        """Without remembered keys; None if the null space of the covariance is empty.

        Args:
            covariance: ``C (p, p)``.
            ridge: its ``B`` within the null space.
            like: a tensor (p, n) of the device to compute on.
            threshold: as for `lit_edit.algebra.linalg.null_space_projector`.
            energy: likewise.
        """
        projector, dimension = null_space_projector(covariance.to(like.device), threshold=threshold, energy=energy)
        if not dimension:
            return None
        return cls(
            covariance, version_of(covariance), *_no_keys(like), projector, ridge, projector, (threshold, energy)
        )

    def alone(self, x: Tensor) -> Tensor:
        """``P B⁻¹ P x``, for ``x (p, n)``."""
        return self.inverse @ x / self.ridge

    def forgetting(self) -> KeptProjection:
        """Without remembered keys."""
        known, marked, fresh, solved, inner = _no_keys(self.marked)
        return replace(
            self, inverse=self.projector, known=known, marked=marked, fresh=fresh, solved=solved, inner=inner
        )

    def folded(self) -> KeptProjection:
        """With the fresh keys in ``B``."""
        half = torch.linalg.solve_triangular(self.inner, self.solved.T, upper=False)
        none = self.fresh[:, :0].clone()
        inverse = torch.addmm(self.inverse, half.T, half, alpha=-self.ridge)
        return replace(self, inverse=inverse, fresh=none, solved=none, inner=none.T @ none)


def _no_keys(like: Tensor) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
    none = like[:, :0].clone()  # a view would keep all of it
    return 0, none, none, none, none.T @ none


def room_for_keys(p: int) -> int:
    """How many numbers are kept at most beside ``B`` for remembered keys of size ``p``."""
    return 2 * p * max(FOLD_AT, p // 16)


def marks(remembered: Tensor, known: int) -> Tensor:
    """A few of the first ``known`` columns, the first and the last among them, by which they are known again.

    Keys are never the same by chance, and comparing all of them would take the longer the more there are.
    """
    return remembered[:, sorted({0, known // 3, 2 * known // 3, known - 1}) if known else []]
