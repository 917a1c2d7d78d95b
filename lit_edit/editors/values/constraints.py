"""Constraints: the set that values may come from."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lit_edit.settings import Configured


class Constraint(Configured, ABC):
    """The set a value may come from. ``replaces`` says whether it takes the output's place or is added to it."""

    replaces: bool

    @abstractmethod
    def value(self, start: Tensor, delta: Tensor) -> Tensor:
        """The value for a change of the starting point, both (..., d)."""

    @abstractmethod
    def project(self, start: Tensor, delta: Tensor) -> Tensor:
        """The change after each step, moved back to where it is allowed, (..., d)."""


class NormClamp(Constraint):
    """ROME's and MEMIT's constraint: the change is at most ``factor`` times as long as the original output."""

    replaces = False

    def __init__(self, factor: float = 4.0) -> None:
        if not factor > 0:
            raise ValueError(f"The clamp factor must be positive, not {factor}.")
        self.factor = factor

    def value(self, start: Tensor, delta: Tensor) -> Tensor:
        """Start plus change."""
        return start + delta

    def project(self, start: Tensor, delta: Tensor) -> Tensor:
        """Shortens what is too long."""
        limit = self.factor * start.norm(dim=-1, keepdim=True)
        return delta * (limit / delta.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)


class NormMatched(Constraint):
    """Values on the sphere ``‖v‖ = ‖W k‖``: the only ones an orthogonal update can reach exactly.

    ``W ← Q W`` keeps the norm of every output, so a target of another length is met in direction at best. The
    value replaces the output in every context, as the edited weight will put out nearly the same in all of them.
    """

    replaces = True

    def value(self, start: Tensor, delta: Tensor) -> Tensor:
        """Start plus change, brought back to the length of start."""
        moved = start + delta
        return moved * (start.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp_min(1e-12))

    def project(self, start: Tensor, delta: Tensor) -> Tensor:
        """The change itself put on the sphere, so that its length does not run away."""
        return self.value(start, delta) - start
