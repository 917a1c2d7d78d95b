"""Changes to a weight: what a solver returns, what is written, taken back and stored.

Every update acts on a weight in canonical orientation ``(d, p)`` = (d_out, d_in). Pass a transposed view where a module
stores the transpose: updates write through views.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lit_edit.algebra.exact import part, pieces, remainder_of, stored_along, widened
from lit_edit.algebra.linalg import less_one

_WIDE = 512  # rows or columns multiplied by a large dense matrix at a time: reading it takes less than multiplying
_NARROW = 64  # the same for a thin one, which stays in a cache
_ORTHOGONALITY_TOLERANCE = 1e-8


class UnwritableError(ValueError):
    """An edit that has no update: its numbers are not finite, or lead out of the range of the weight's dtype."""


class Applied(NamedTuple):
    """What applying an update did to a weight.

    Attributes:
        relative_change: ``‖ΔW‖_F / ‖W‖_F``, before rounding and by the weight as it was before.
        rounding: ``‖W_stored − W_exact‖_F / ‖ΔW‖_F``, what rounding took of the change: from 0 to 1, which says that
            nothing was stored. With a remainder, which holds what was taken of earlier changes too, 1 at most.
    """

    relative_change: float
    rounding: float


class _Change(NamedTuple):
    """A change that can be computed for some columns, or some rows, of a weight alone.

    Attributes:
        along: Dimension it can be cut along: 0 for rows, 1 for columns.
        of: Dense change in float64 of a piece in its place; of the whole weight for ``slice(None)``.
        width: Least number of rows or columns worth computing by themselves.
    """

    along: int
    of: Callable[[Tensor, slice], Tensor]
    width: int = 1


class Update(ABC):
    """A change to one weight, held as a few float64 tensors."""

    @abstractmethod
    def _check(self, weight: Tensor) -> None:
        """Raises ValueError if the update does not fit the weight's shape."""

    @abstractmethod
    def _change(self, weight: Tensor) -> _Change:
        """The change of ``weight (d, p)``, which fits."""

    @abstractmethod
    def inverse(self) -> Update:
        """The update that takes this one back, up to rounding."""

    @property
    @abstractmethod
    def norm(self) -> float:
        """Frobenius norm of the change: ``‖ΔW‖_F``, or ``‖Q − I‖_F`` for a rotation, which knows no weight."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The update as named tensors and nothing else, for a file or a checkpoint."""

    @staticmethod
    def from_state_dict(state: Mapping[str, Tensor]) -> Update:
        """Rebuilds an update from `state_dict`; the names of the tensors say its kind.

        Raises:
            ValueError: If the names belong to no kind of update.
        """
        names = set(state)
        if names == {"left", "right"}:
            return LowRank(state["left"], state["right"])
        if names == {"change"}:
            return Additive(state["change"])
        if {"turn", "of_keys"} <= names <= {"turn", "of_keys", "basis"}:
            return Rotation(state["turn"], state.get("basis"), bool(state["of_keys"]))
        raise ValueError(
            f"No update has the tensors {', '.join(sorted(names)) or '(none)'}. Known are left and right (LowRank), "
            "change (Additive), turn, of_keys and possibly basis (Rotation)."
        )

    def delta(self, weight: Tensor) -> Tensor:
        """The dense change this update makes to ``weight (d, p)``, before rounding: ``(d, p)`` in float64.

        Raises:
            ValueError: If the update does not fit the weight's shape.
        """
        self._check(weight)
        return self._change(weight).of(weight.detach(), slice(None))

    def rank(self, weight: Tensor) -> int:
        """Bound on the rank of the change to ``weight (d, p)``."""
        return min(weight.shape)

    @torch.no_grad()
    def apply_(self, weight: Tensor, remainder: Tensor | None = None) -> Applied:
        """Changes ``weight (d, p)`` in place: computed in float64, rounded once to the weight's dtype.

        Args:
            weight: As above.
            remainder: What rounding took of it so far (`lit_edit.algebra.exact`), ``(d, p)``. The change is then one of
                the sum of both, and what rounding takes this time replaces it.

        Raises:
            ValueError: If the update does not fit the weight's shape or the result is not finite in the weight's dtype.
                The weight and the remainder are then unchanged.
        """
        self._check(weight)
        weight = weight.detach()
        if remainder is not None and remainder.shape != weight.shape:
            raise ValueError(
                f"A remainder of shape {tuple(remainder.shape)} is none of a weight of shape {tuple(weight.shape)}."
            )
        change = self._change(weight)
        places = list(pieces(weight, change.along, change.width))
        tensors = [weight] if remainder is None else [weight, remainder]
        former = [torch.empty_like(tensor) for tensor in tensors]
        sizes = weight.new_zeros(3, len(places), dtype=torch.float64)
        written = 0
        try:
            for i, place in enumerate(places):
                here = [part(tensor, change.along, place) for tensor in tensors]
                exact = widened(here[0], here[1] if remainder is not None else None)
                delta = change.of(exact, place)
                sizes[0, i], sizes[1, i] = torch.linalg.vector_norm(exact), torch.linalg.vector_norm(delta)
                exact += delta
                rounded = exact.to(weight.dtype)
                if not torch.isfinite(rounded).all():
                    raise UnwritableError(
                        f"{type(self).__name__} of norm {self.norm:.3g} takes the weight of shape "
                        f"{tuple(weight.shape)} out of the range of {weight.dtype}."
                    )
                for kept, tensor in zip(former, here, strict=True):
                    part(kept, change.along, place).copy_(tensor)
                written = i + 1
                here[0].copy_(rounded)
                if remainder is not None:
                    here[1].copy_(remainder_of(exact, rounded))
                sizes[2, i] = torch.linalg.vector_norm(exact.sub_(rounded))
        except BaseException:  # an interrupt by the keyboard, too
            for place in places[:written]:
                for kept, tensor in zip(former, tensors, strict=True):
                    part(tensor, change.along, place).copy_(part(kept, change.along, place))
            raise
        before, wanted, lost = torch.linalg.vector_norm(sizes, dim=1).tolist()
        relative = wanted / before if before else math.inf if wanted else 0.0
        rounding = lost / wanted if wanted else 0.0
        return Applied(relative, rounding if remainder is None else min(rounding, 1.0))

    def _hold(self, name: str, kind: str) -> Tensor:
        """Checks a field and keeps a contiguous float64 copy: a record of an edit, which later changes leave alone."""
        tensor: Tensor = getattr(self, name)
        tensor = tensor.detach().to(torch.float64).clone(memory_format=torch.contiguous_format)
        if not torch.isfinite(tensor).all():
            raise UnwritableError(f"{kind} of shape {tuple(tensor.shape)} holds values that are not finite.")
        object.__setattr__(self, name, tensor)
        return tensor


@dataclass(frozen=True, eq=False)
class LowRank(Update):
    """``W ← W + left @ right``.

    Args:
        left: ``(d, n)``.
        right: ``(n, p)``.

    Raises:
        ValueError: If the factors do not fit together or are not finite.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
            raise ValueError(
                f"The factors of a low-rank update do not fit: left {tuple(self.left.shape)}, right "
                f"{tuple(self.right.shape)}."
            )
        self._hold("left", "The left factor")
        self._hold("right", "The right factor")

    def _check(self, weight: Tensor) -> None:
        shape = (self.left.shape[0], self.right.shape[1])
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"A low-rank update of shape {shape} does not fit a weight of shape {tuple(weight.shape)}."
            )

    def _change(self, weight: Tensor) -> _Change:
        left, right = self.left.to(weight.device), self.right.to(weight.device)
        if stored_along(weight):
            return _Change(1, lambda _, place: left @ right[:, place])
        return _Change(0, lambda _, place: left[place] @ right)

    def inverse(self) -> LowRank:
        """``W ← W − left @ right``."""
        return LowRank(-self.left, self.right)

    def rank(self, weight: Tensor) -> int:
        """``n`` at most."""
        return min(*weight.shape, self.left.shape[1])

    @property
    def norm(self) -> float:
        """``‖left @ right‖_F``, without forming the product."""
        # ‖L R‖_F = ‖L Tᵀ‖_F with Rᵀ = Q T. The Gram matrices of L and R would lose half the digits where terms cancel.
        triangle = torch.linalg.qr(self.right.T, mode="r").R
        return float(torch.linalg.vector_norm(self.left @ triangle.T))

    def state_dict(self) -> dict[str, Tensor]:
        """``left`` and ``right``."""
        return {"left": self.left, "right": self.right}


@dataclass(frozen=True, eq=False)
class Additive(Update):
    """``W ← W + change``, with a dense change.

    Args:
        change: ``(d, p)``.

    Raises:
        ValueError: If the change is not a finite matrix.
    """

    change: Tensor

    def __post_init__(self) -> None:
        if self.change.ndim != 2:
            raise ValueError(f"The change must be a matrix, got shape {tuple(self.change.shape)}.")
        self._hold("change", "The change")

    def _check(self, weight: Tensor) -> None:
        if weight.shape != self.change.shape:
            raise ValueError(
                f"An additive update of shape {tuple(self.change.shape)} does not fit a weight of shape "
                f"{tuple(weight.shape)}."
            )

    def _change(self, weight: Tensor) -> _Change:
        along, change = stored_along(weight), self.change.to(weight.device)
        return _Change(along, lambda _, place: change[:, place] if along else change[place])

    def inverse(self) -> Additive:
        """``W ← W − change``."""
        return Additive(-self.change)

    @property
    def norm(self) -> float:
        """``‖change‖_F``."""
        return float(torch.linalg.vector_norm(self.change))

    def state_dict(self) -> dict[str, Tensor]:
        """``change``."""
        return {"change": self.change}


@dataclass(frozen=True, eq=False)
class Rotation(Update):
    """``W ← Q W``, or ``W ← W Q`` where keys are turned, with an orthogonal ``Q``: singular values stay as they are.

    They stay to the rounding of the weight's dtype, which adds up over a sequence of edits: in float32 each drifts by
    about 2e-7 of the largest over a thousand edits. bfloat16 rounds by 4e-3 every time, and float16 by 5e-4, unless
    what rounding takes is carried along (`apply_` with a remainder): the sum then drifts as float32 does, and what is
    stored is off by one rounding, however many edits there were.

    ``Q`` comes in one of three forms:

    * dense: ``turn (n, n)``;
    * thin: ``Q = I + basis (turn − I) basisᵀ`` with ``basis (n, k)`` and ``turn (k, k)``: orthogonal whatever the basis
      leaves out, stored as ``k (n + k)`` numbers and applied in ``O(d p k)``;
    * block-diagonal: ``turn (m, b, b)`` with ``m b = n``.

    Args:
        turn: As above; orthogonal to 1e-8.
        basis: As above, with orthonormal columns to 1e-8; None for the other forms.
        of_keys: Whether ``Q`` acts on the right.

    Raises:
        ValueError: If the two do not fit together, or are not finite and orthogonal.
    """

    turn: Tensor
    basis: Tensor | None = None
    of_keys: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.turn.shape)
        if self.turn.ndim not in (2, 3) or shape[-1] != shape[-2]:
            raise ValueError(f"The turn of a rotation must be square, or a stack of square blocks, got shape {shape}.")
        _check_orthonormal(self._hold("turn", "The turn"), "turn")
        if self.basis is None:
            return
        if self.basis.ndim != 2 or self.turn.ndim != 2 or self.basis.shape[1] != shape[0]:
            raise ValueError(f"A basis of shape {tuple(self.basis.shape)} does not fit a turn of shape {shape}.")
        _check_orthonormal(self._hold("basis", "The basis"), "basis")

    @property
    def size(self) -> int:
        """``n``: ``Q`` is ``(n, n)``."""
        if self.basis is not None:
            return len(self.basis)
        return self.turn.shape[-1] * (len(self.turn) if self.turn.ndim == 3 else 1)

    def _check(self, weight: Tensor) -> None:
        if weight.ndim != 2 or weight.shape[self.of_keys] != self.size:
            which = "second dimension must be the input's" if self.of_keys else "first dimension must be the output's"
            raise ValueError(
                f"A rotation of size {self.size} does not fit a weight of shape {tuple(weight.shape)}; the {which}."
            )

    def _change(self, weight: Tensor) -> _Change:
        turn = self.turn.to(weight.device)
        along = 0 if self.of_keys else 1
        if self.basis is not None:
            basis, less = self.basis.to(weight.device), less_one(turn)
            if self.of_keys:
                return _Change(along, lambda piece, _: (piece.to(torch.float64) @ basis) @ less @ basis.T, _NARROW)
            return _Change(along, lambda piece, _: basis @ (less @ (basis.T @ piece.to(torch.float64))), _NARROW)

        def of(piece: Tensor, _: slice) -> Tensor:
            piece = piece.to(torch.float64)
            if turn.ndim == 2:
                return (piece @ turn if self.of_keys else turn @ piece) - piece
            m, b = turn.shape[:2]
            if not self.of_keys:
                return (turn @ piece.reshape(m, b, -1)).reshape(piece.shape) - piece
            turned = piece.reshape(-1, m, b).transpose(0, 1) @ turn
            return turned.transpose(0, 1).reshape(piece.shape) - piece

        return _Change(along, of, _WIDE if turn.ndim == 2 else min(turn.shape[-1], _WIDE))

    def inverse(self) -> Rotation:
        """``W ← Qᵀ W``, or ``W ← W Qᵀ``."""
        return Rotation(self.turn.mT, self.basis, self.of_keys)

    @property
    def norm(self) -> float:
        """``‖Q − I‖_F``; ``2 √n`` at most."""
        eye = torch.eye(self.turn.shape[-1], dtype=torch.float64, device=self.turn.device)
        return float(torch.linalg.vector_norm(self.turn - eye))

    def state_dict(self) -> dict[str, Tensor]:
        """``turn``, ``of_keys``, and ``basis`` where there is one."""
        state = {"turn": self.turn, "of_keys": torch.tensor(self.of_keys)}
        return state if self.basis is None else {**state, "basis": self.basis}


def _check_orthonormal(columns: Tensor, kind: str) -> None:
    gram = columns.mT @ columns
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    if not gram.numel():
        return
    worst = gram.abs().flatten(-2).amax(-1)
    error = float(worst.max())
    if error > _ORTHOGONALITY_TOLERANCE:
        where = f" (block {int(worst.argmax())} of {len(worst)})" if worst.ndim else ""
        raise ValueError(
            f"The {kind} of a rotation, of shape {tuple(columns.shape)}, is not orthogonal{where}: QᵀQ departs from "
            f"the identity by {error:.1e} (at most {_ORTHOGONALITY_TOLERANCE:.0e} is accepted). Compute it in float64."
        )
