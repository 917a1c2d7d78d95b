"""Changes to a weight: what a solver returns, what is applied, undone and stored.

Every update acts on a weight in canonical orientation ``(d, p)`` = (d_out, d_in). Pass a transposed view where a module
stores the transpose: updates write through views.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lit_edit.linalg import less_one, orthogonality_error

_ORTHOGONALITY_TOLERANCE = 1e-8
_UpdateT = TypeVar("_UpdateT", bound="Update")


class Written(NamedTuple):
    """What writing an update did to a weight.

    Attributes:
        relative_change: ``‖ΔW‖_F / ‖W‖_F``, before rounding and by the weight as it was before.
        rounding: what rounding took of the change, see `Update.apply_`.
    """

    relative_change: float
    rounding: float


class Update(ABC):
    """A change to one weight, held as a few float64 tensors.

    A kind of update is a frozen dataclass of tensors; the names of its fields identify it in a file.
    """

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """The dense change this update makes to ``weight (d, p)``, before rounding: ``(d, p)`` in float64.

        Raises:
            ValueError: if the update does not fit the weight's shape.
        """

    @abstractmethod
    def _inverse_delta(self, weight: Tensor) -> Tensor:
        """The dense change that takes the edited ``weight`` back, ``(d, p)`` in float64."""

    def rank(self, weight: Tensor) -> int:
        """What the rank of the change to ``weight (d, p)`` is at most: ``min(d, p)``, less where the form says so."""
        return min(weight.shape)

    @property
    @abstractmethod
    def norm(self) -> float:
        """Frobenius norm of the change: ``‖ΔW‖_F``, or ``‖Q − I‖_F`` for a rotation, which knows no weight."""

    def apply_(self, weight: Tensor) -> float:
        """Change ``weight (d, p)`` in place: computed in float64, rounded once to the weight's dtype.

        Returns:
            What rounding took of the change: ``‖W_stored − W_exact‖_F / ‖W_exact − W_old‖_F``, from 0 to 1. The entries
            of ``W_old`` are numbers that can be stored, so none is rounded by more than it was to change: 1 says that
            nothing was written. 0 for an update that changes nothing.

        Raises:
            ValueError: if the update does not fit the weight's shape or the result is not finite in the weight's dtype.
                The weight is then unchanged.
        """
        return self._add_(weight, self.delta(weight))[1]

    def write_(self, weight: Tensor) -> Written:
        """:meth:`apply_`, and how large the change is beside the weight; the change is computed once.

        Raises:
            ValueError: as :meth:`apply_`.
        """
        before = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))
        size, rounding = self._add_(weight, self.delta(weight))
        return Written(size / before if before else math.inf if size else 0.0, rounding)

    def undo_(self, weight: Tensor) -> float:
        """Take back :meth:`apply_`, exact up to the rounding of the weight's dtype.

        Returns:
            As :meth:`apply_`.

        Raises:
            ValueError: as :meth:`apply_`.
        """
        return self._add_(weight, self._inverse_delta(weight))[1]

    def state_dict(self) -> dict[str, Tensor]:
        """The update as named tensors and nothing else, for a safetensors file or a checkpoint."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_state_dict(cls: type[_UpdateT], state: Mapping[str, Tensor]) -> _UpdateT:
        """Rebuild an update from :meth:`state_dict`.

        Called on :class:`Update` itself it finds the kind from the names of the tensors.

        Raises:
            ValueError: if the names belong to no kind of update, or not to this one.
        """
        kinds = [kind for kind in (cls, *cls.__subclasses__()) if kind is not Update]
        names = {kind: {field.name for field in fields(kind)} for kind in kinds}  # type: ignore[arg-type]
        for kind in kinds:
            if names[kind] == set(state):
                return kind(**state)
        known = "; ".join(f"{kind.__name__}: {', '.join(sorted(names[kind]))}" for kind in kinds)
        raise ValueError(f"No update has the tensors {', '.join(sorted(state)) or '(none)'}. Known are {known}.")

    @torch.no_grad()
    def _add_(self, weight: Tensor, delta: Tensor) -> tuple[float, float]:
        """``‖delta‖_F``, and what rounding took of it."""
        exact = weight.detach().to(torch.float64) + delta
        rounded = exact.to(weight.dtype)
        if not torch.isfinite(rounded).all():
            raise ValueError(
                f"{type(self).__name__} of norm {self.norm:.3g} takes the weight of shape {tuple(weight.shape)} out of "
                f"the range of {weight.dtype}."
            )
        weight.detach().copy_(rounded)
        wanted = float(torch.linalg.vector_norm(delta))
        lost = float(torch.linalg.vector_norm(exact.sub_(rounded)))  # the float64 copy is not needed any more
        return wanted, lost / wanted if wanted else 0.0

    def _hold(self, name: str, kind: str, ndim: int = 2) -> Tensor:
        """Check a field and keep a contiguous float64 copy: a record of an edit that later changes elsewhere leave."""
        tensor = getattr(self, name)
        if tensor.ndim != ndim:
            what = "a matrix" if ndim == 2 else "a stack of matrices"
            raise ValueError(f"{kind} must be {what}, got shape {tuple(tensor.shape)}.")
        tensor = tensor.detach().to(torch.float64).clone(memory_format=torch.contiguous_format)
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{kind} of shape {tuple(tensor.shape)} holds values that are not finite.")
        object.__setattr__(self, name, tensor)
        return tensor


@dataclass(frozen=True, eq=False)
class LowRank(Update):
    """``W ← W + left @ right``.

    Args:
        left: ``(d, n)``.
        right: ``(n, p)``.

    Raises:
        ValueError: if the factors do not fit together or are not finite.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        left, right = self._hold("left", "The left factor"), self._hold("right", "The right factor")
        if left.shape[1] != right.shape[0]:
            raise ValueError(
                f"The factors of a low-rank update do not fit: left {tuple(left.shape)}, right {tuple(right.shape)}."
            )

    def delta(self, weight: Tensor) -> Tensor:
        """``left @ right``, ``(d, p)``."""
        shape = (self.left.shape[0], self.right.shape[1])
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"A low-rank update of shape {shape} does not fit a weight of shape {tuple(weight.shape)}."
            )
        return self.left.to(weight.device) @ self.right.to(weight.device)

    def rank(self, weight: Tensor) -> int:
        """``n`` at most."""
        return min(*weight.shape, self.left.shape[1])

    def _inverse_delta(self, weight: Tensor) -> Tensor:
        return -self.delta(weight)

    @property
    def norm(self) -> float:
        """``‖left @ right‖_F``, without forming the product."""
        # ‖L R‖_F = ‖L Tᵀ‖_F with Rᵀ = Q T. The Gram matrices of L and R would lose half the digits where terms cancel.
        triangle = torch.linalg.qr(self.right.T, mode="r").R
        return float(torch.linalg.vector_norm(self.left @ triangle.T))


@dataclass(frozen=True, eq=False)
class Additive(Update):
    """``W ← W + change``, with a dense change.

    Args:
        change: ``(d, p)``.

    Raises:
        ValueError: if the change is not a finite matrix.
    """

    change: Tensor

    def __post_init__(self) -> None:
        self._hold("change", "The change")

    def delta(self, weight: Tensor) -> Tensor:
        """``change``, ``(d, p)``."""
        if weight.shape != self.change.shape:
            raise ValueError(
                f"An additive update of shape {tuple(self.change.shape)} does not fit a weight of shape "
                f"{tuple(weight.shape)}."
            )
        return self.change.to(weight.device)

    def _inverse_delta(self, weight: Tensor) -> Tensor:
        return -self.delta(weight)

    @property
    def norm(self) -> float:
        """``‖change‖_F``."""
        return float(torch.linalg.vector_norm(self.change))


@dataclass(frozen=True, eq=False)
class Rotation(Update):
    """``W ← Q W`` with an orthogonal ``Q``: the singular values of ``W`` stay as they are.

    They stay to the rounding of the weight's dtype, which adds up over a sequence of edits. In float32 each drifts by
    about 2e-7 of the largest over a thousand edits, so the relative drift of the smallest, and of the condition number,
    is larger the worse the weight is conditioned. bfloat16 rounds by 4e-3 every time: keep edited weights in float32.

    Args:
        q: ``(d, d)``, orthogonal to 1e-8.

    Raises:
        ValueError: if ``q`` is not square, finite and orthogonal.
    """

    q: Tensor

    def __post_init__(self) -> None:
        _check_orthogonal(self._hold("q", "A rotation"), "rotation")

    def _check(self, weight: Tensor) -> None:
        if weight.ndim != 2 or weight.shape[0] != self.q.shape[0]:
            raise ValueError(
                f"A rotation of size {self.q.shape[0]} does not fit a weight of shape {tuple(weight.shape)}; the "
                "first dimension must be the output's."
            )

    def delta(self, weight: Tensor) -> Tensor:
        """``Q W − W``, ``(d, p)``."""
        self._check(weight)
        weight = weight.detach().to(torch.float64)
        return self.q.to(weight.device) @ weight - weight

    def _inverse_delta(self, weight: Tensor) -> Tensor:
        self._check(weight)
        weight = weight.detach().to(torch.float64)
        return self.q.T.to(weight.device) @ weight - weight

    @property
    def norm(self) -> float:
        """``‖Q − I‖_F``; ``2 √d`` at most."""
        return _distance_from_identity(self.q)


@dataclass(frozen=True, eq=False)
class KeyRotation(Update):
    """``W ← W Q`` with an orthogonal ``Q``: keys are turned before they are read, singular values stay as they are.

    What `Rotation` says of rounding holds here, too.

    Args:
        key_q: ``(p, p)``, orthogonal to 1e-8.

    Raises:
        ValueError: if ``key_q`` is not square, finite and orthogonal.
    """

    key_q: Tensor

    def __post_init__(self) -> None:
        _check_orthogonal(self._hold("key_q", "A key rotation"), "key rotation")

    def _check(self, weight: Tensor) -> None:
        if weight.ndim != 2 or weight.shape[1] != self.key_q.shape[0]:
            raise ValueError(
                f"A key rotation of size {self.key_q.shape[0]} does not fit a weight of shape {tuple(weight.shape)}; "
                "the second dimension must be the input's."
            )

    def delta(self, weight: Tensor) -> Tensor:
        """``W Q − W``, ``(d, p)``."""
        self._check(weight)
        weight = weight.detach().to(torch.float64)
        return weight @ self.key_q.to(weight.device) - weight

    def _inverse_delta(self, weight: Tensor) -> Tensor:
        self._check(weight)
        weight = weight.detach().to(torch.float64)
        return weight @ self.key_q.T.to(weight.device) - weight

    @property
    def norm(self) -> float:
        """``‖Q − I‖_F``; ``2 √p`` at most."""
        return _distance_from_identity(self.key_q)


@dataclass(frozen=True, eq=False)
class BlockKeyRotation(Update):
    """``W ← W blockdiag(Q_1, …, Q_n)`` with orthogonal ``Q_i``: a `KeyRotation` without its zeros.

    Stored, checked and applied block by block: ``n b²`` numbers, ``O(d p b)`` operations. What `Rotation` says of
    rounding holds here, too.

    Args:
        key_blocks: ``(n, b, b)`` with ``n b = p``, each block orthogonal to 1e-8.

    Raises:
        ValueError: if the blocks are not square, finite and orthogonal; the message names the worst.
    """

    key_blocks: Tensor

    def __post_init__(self) -> None:
        blocks = self._hold("key_blocks", "The blocks of a key rotation", ndim=3)
        if blocks.shape[1] != blocks.shape[2]:
            raise ValueError(f"The blocks of a key rotation must be square, got shape {tuple(blocks.shape)}.")
        if not blocks.numel():
            return
        gram = blocks.mT @ blocks
        gram.diagonal(dim1=1, dim2=2).sub_(1.0)
        error, worst = gram.abs().amax(dim=(1, 2)).max(dim=0)
        if float(error) > _ORTHOGONALITY_TOLERANCE:
            raise ValueError(
                f"Block {int(worst)} of {len(blocks)} of a key rotation is not orthogonal: QᵀQ departs from the "
                f"identity by {float(error):.1e} (at most {_ORTHOGONALITY_TOLERANCE:.0e} is accepted). Compute it in "
                "float64."
            )

    def delta(self, weight: Tensor) -> Tensor:
        """``W blockdiag(Q_1, …, Q_n) − W``, ``(d, p)``."""
        return self._turned(weight, self.key_blocks)

    def _inverse_delta(self, weight: Tensor) -> Tensor:
        return self._turned(weight, self.key_blocks.mT)

    def _turned(self, weight: Tensor, blocks: Tensor) -> Tensor:
        n, b, _ = blocks.shape
        if weight.ndim != 2 or weight.shape[1] != n * b:
            raise ValueError(
                f"A key rotation of size {n * b}, in {n} blocks, does not fit a weight of shape "
                f"{tuple(weight.shape)}; the second dimension must be the input's."
            )
        weight = weight.detach().to(torch.float64)
        turned = weight.reshape(-1, n, b).transpose(0, 1) @ blocks.to(weight.device)
        return turned.transpose(0, 1).reshape(weight.shape) - weight

    @property
    def norm(self) -> float:
        """``‖Q − I‖_F`` of the whole rotation; ``2 √p`` at most."""
        eye = torch.eye(self.key_blocks.shape[1], dtype=torch.float64, device=self.key_blocks.device)
        return float(torch.linalg.vector_norm(self.key_blocks - eye))


@dataclass(frozen=True, eq=False)
class ThinRotation(Update):
    """``W ← Q W`` with ``Q = I + basis (turn − I) basisᵀ``: orthogonal whatever the basis leaves out.

    Stored and applied in the size of the basis: ``k (d + k)`` numbers, ``O(d p k)`` operations. What `Rotation` says of
    rounding holds here, too.

    Args:
        basis: ``B (d, k)``, with orthonormal columns to 1e-8.
        turn: ``T (k, k)``, orthogonal to 1e-8.

    Raises:
        ValueError: if the two do not fit together, or are not orthogonal.
    """

    basis: Tensor
    turn: Tensor

    def __post_init__(self) -> None:
        _check_thin(self._hold("basis", "A basis"), self._hold("turn", "A turn"))

    def delta(self, weight: Tensor) -> Tensor:
        """``B (T − I) Bᵀ W``, ``(d, p)``."""
        return self._turned(weight, self.turn)

    def _inverse_delta(self, weight: Tensor) -> Tensor:
        return self._turned(weight, self.turn.T)

    def _turned(self, weight: Tensor, turn: Tensor) -> Tensor:
        if weight.ndim != 2 or weight.shape[0] != self.basis.shape[0]:
            raise ValueError(
                f"A rotation of size {self.basis.shape[0]} does not fit a weight of shape {tuple(weight.shape)}; the "
                "first dimension must be the output's."
            )
        basis = self.basis.to(weight.device)
        return basis @ (less_one(turn).to(weight.device) @ (basis.T @ weight.detach().to(torch.float64)))

    @property
    def norm(self) -> float:
        """``‖Q − I‖_F``; ``2 √k`` at most."""
        return _distance_from_identity(self.turn)


@dataclass(frozen=True, eq=False)
class ThinKeyRotation(Update):
    """``W ← W Q`` with ``Q = I + key_basis (key_turn − I) key_basisᵀ``, the thin form of `KeyRotation`.

    Args:
        key_basis: ``B (p, k)``, with orthonormal columns to 1e-8.
        key_turn: ``T (k, k)``, orthogonal to 1e-8.

    Raises:
        ValueError: if the two do not fit together, or are not orthogonal.
    """

    key_basis: Tensor
    key_turn: Tensor

    def __post_init__(self) -> None:
        _check_thin(self._hold("key_basis", "A key basis"), self._hold("key_turn", "A key turn"))

    def delta(self, weight: Tensor) -> Tensor:
        """``W B (T − I) Bᵀ``, ``(d, p)``."""
        return self._turned(weight, self.key_turn)

    def _inverse_delta(self, weight: Tensor) -> Tensor:
        return self._turned(weight, self.key_turn.T)

    def _turned(self, weight: Tensor, turn: Tensor) -> Tensor:
        if weight.ndim != 2 or weight.shape[1] != self.key_basis.shape[0]:
            raise ValueError(
                f"A key rotation of size {self.key_basis.shape[0]} does not fit a weight of shape "
                f"{tuple(weight.shape)}; the second dimension must be the input's."
            )
        basis = self.key_basis.to(weight.device)
        return (weight.detach().to(torch.float64) @ basis) @ less_one(turn).to(weight.device) @ basis.T

    @property
    def norm(self) -> float:
        """``‖Q − I‖_F``; ``2 √k`` at most."""
        return _distance_from_identity(self.key_turn)


def _check_thin(basis: Tensor, turn: Tensor) -> None:
    if basis.shape[1] != turn.shape[0]:
        raise ValueError(f"A basis of shape {tuple(basis.shape)} does not fit a turn of shape {tuple(turn.shape)}.")
    _check_orthogonal(turn, "turn")
    gram = basis.T @ basis
    gram.diagonal().sub_(1.0)
    error = float(gram.abs().max()) if gram.numel() else 0.0
    if error > _ORTHOGONALITY_TOLERANCE:
        raise ValueError(
            f"The columns of a basis of shape {tuple(basis.shape)} are not orthonormal: BᵀB departs from the identity "
            f"by {error:.1e} (at most {_ORTHOGONALITY_TOLERANCE:.0e} is accepted). Compute it in float64."
        )


def _check_orthogonal(q: Tensor, kind: str) -> None:
    if q.shape[0] != q.shape[1]:
        raise ValueError(f"A {kind} must be square, got shape {tuple(q.shape)}.")
    error = orthogonality_error(q)
    if error > _ORTHOGONALITY_TOLERANCE:
        raise ValueError(
            f"The {q.shape[0]}x{q.shape[1]} matrix of a {kind} is not orthogonal: QᵀQ departs from the identity "
            f"by {error:.1e} (at most {_ORTHOGONALITY_TOLERANCE:.0e} is accepted). Compute it in float64."
        )


def _distance_from_identity(q: Tensor) -> float:
    return float(torch.linalg.vector_norm(less_one(q)))
