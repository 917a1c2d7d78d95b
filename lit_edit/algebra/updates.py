"""Changes to a weight: what a solver returns, what is applied, undone and stored.

Every update acts on a weight in canonical orientation ``(d, p)`` = (d_out, d_in). Pass a transposed view where a module
stores the transpose: updates write through views.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lit_edit.algebra.exact import part, pieces, remainder_of, stored_along, widened
from lit_edit.algebra.linalg import less_one, orthogonality_error

_WIDE = 512  # rows or columns multiplied by a large dense matrix at a time: reading it takes less than multiplying
_NARROW = 64  # the same for a thin one, which stays in a cache
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


class _Change(NamedTuple):
    """A change that can be computed for some columns, or some rows, of a weight alone.

    Attributes:
        along: the dimension it can be cut along: 0 for rows, 1 for columns.
        of: the dense change in float64 of a piece in its place; of the whole weight for ``slice(None)``.
        width: the least number of rows or columns that are worth computing by themselves.
    """

    along: int
    of: Callable[[Tensor, slice], Tensor]
    width: int = 1


class Update(ABC):
    """A change to one weight, held as a few float64 tensors.

    A kind of update is a frozen dataclass of tensors; the names of its fields identify it in a file.
    """

    @abstractmethod
    def _check(self, weight: Tensor) -> None:
        """Raises ValueError if the update does not fit the weight's shape."""

    @abstractmethod
    def _change(self, weight: Tensor, inverse: bool) -> _Change:
        """The change of ``weight (d, p)``, which fits, or the one that takes the edited weight back."""

    def delta(self, weight: Tensor) -> Tensor:
        """The dense change this update makes to ``weight (d, p)``, before rounding: ``(d, p)`` in float64.

        Raises:
            ValueError: if the update does not fit the weight's shape.
        """
        self._check(weight)
        return self._change(weight, inverse=False).of(weight.detach(), slice(None))

    def rank(self, weight: Tensor) -> int:
        """What the rank of the change to ``weight (d, p)`` is at most: ``min(d, p)``, less where the form says so."""
        return min(weight.shape)

    @property
    @abstractmethod
    def norm(self) -> float:
        """Frobenius norm of the change: ``‖ΔW‖_F``, or ``‖Q − I‖_F`` for a rotation, which knows no weight."""

    def apply_(self, weight: Tensor, remainder: Tensor | None = None) -> float:
        """Change ``weight (d, p)`` in place: computed in float64, rounded once to the weight's dtype.

        Args:
            weight: as above.
            remainder: what rounding took of it so far (`lit_edit.algebra.exact`), ``(d, p)``. The change is then one
            of the sum
                of both, and what rounding takes this time is put in its place.

        Returns:
            What rounding took of the change: ``‖W_stored − W_exact‖_F / ‖W_exact − W_old‖_F``, from 0 to 1. The entries
            of ``W_old`` are numbers that can be stored, so none is rounded by more than it was to change: 1 says that
            nothing was written. 0 for an update that changes nothing. With a remainder, which holds what was taken of
            earlier changes, too, what is not stored may be more than this change; 1 then says as much.

        Raises:
            ValueError: if the update does not fit the weight's shape or the result is not finite in the weight's dtype.
                The weight and the remainder are then unchanged.
        """
        return self._write_(weight, remainder).rounding

    def write_(self, weight: Tensor, remainder: Tensor | None = None) -> Written:
        """:meth:`apply_`, and how large the change is beside the weight; the change is computed once.

        Raises:
            ValueError: as :meth:`apply_`.
        """
        return self._write_(weight, remainder)

    def undo_(self, weight: Tensor, remainder: Tensor | None = None) -> float:
        """Take back :meth:`apply_`, exact up to the rounding of the weight's dtype.

        Returns:
            As :meth:`apply_`.

        Raises:
            ValueError: as :meth:`apply_`.
        """
        return self._write_(weight, remainder, inverse=True).rounding

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
    def _write_(self, weight: Tensor, remainder: Tensor | None, inverse: bool = False) -> Written:
        self._check(weight)
        weight = weight.detach()
        if remainder is not None and remainder.shape != weight.shape:
            raise ValueError(
                f"A remainder of shape {tuple(remainder.shape)} is none of a weight of shape {tuple(weight.shape)}."
            )
        change = self._change(weight, inverse)
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
                    raise ValueError(
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
        return Written(relative, rounding if remainder is None else min(rounding, 1.0))

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

    def _check(self, weight: Tensor) -> None:
        shape = (self.left.shape[0], self.right.shape[1])
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"A low-rank update of shape {shape} does not fit a weight of shape {tuple(weight.shape)}."
            )

    def _change(self, weight: Tensor, inverse: bool) -> _Change:
        left, right = self.left.to(weight.device), self.right.to(weight.device)
        if inverse:
            left = -left
        if stored_along(weight):
            return _Change(1, lambda _, place: left @ right[:, place])
        return _Change(0, lambda _, place: left[place] @ right)

    def rank(self, weight: Tensor) -> int:
        """``n`` at most."""
        return min(*weight.shape, self.left.shape[1])

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

    def _check(self, weight: Tensor) -> None:
        if weight.shape != self.change.shape:
            raise ValueError(
                f"An additive update of shape {tuple(self.change.shape)} does not fit a weight of shape "
                f"{tuple(weight.shape)}."
            )

    def _change(self, weight: Tensor, inverse: bool) -> _Change:
        along, change = stored_along(weight), self.change.to(weight.device)

        def of(_: Tensor, place: slice) -> Tensor:
            found = change[:, place] if along else change[place]
            return -found if inverse else found

        return _Change(along, of)

    @property
    def norm(self) -> float:
        """``‖change‖_F``."""
        return float(torch.linalg.vector_norm(self.change))


@dataclass(frozen=True, eq=False)
class Rotation(Update):
    """``W ← Q W`` with an orthogonal ``Q``: the singular values of ``W`` stay as they are.

    They stay to the rounding of the weight's dtype, which adds up over a sequence of edits. In float32 each drifts by
    about 2e-7 of the largest over a thousand edits, so the relative drift of the smallest, and of the condition number,
    is larger the worse the weight is conditioned. bfloat16 rounds by 4e-3 every time, and float16 by 5e-4, unless what
    rounding takes is carried along (`apply_` with a remainder, as editors do): the sum then drifts as float32 does, and
    what is stored is off by one rounding, however many edits there were.

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

    def _change(self, weight: Tensor, inverse: bool) -> _Change:
        q = (self.q.T if inverse else self.q).to(weight.device)

        def of(piece: Tensor, _: slice) -> Tensor:
            piece = piece.to(torch.float64)
            return q @ piece - piece

        return _Change(1, of, _WIDE)

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

    def _change(self, weight: Tensor, inverse: bool) -> _Change:
        q = (self.key_q.T if inverse else self.key_q).to(weight.device)

        def of(piece: Tensor, _: slice) -> Tensor:
            piece = piece.to(torch.float64)
            return piece @ q - piece

        return _Change(0, of, _WIDE)

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

    def _check(self, weight: Tensor) -> None:
        n, b, _ = self.key_blocks.shape
        if weight.ndim != 2 or weight.shape[1] != n * b:
            raise ValueError(
                f"A key rotation of size {n * b}, in {n} blocks, does not fit a weight of shape "
                f"{tuple(weight.shape)}; the second dimension must be the input's."
            )

    def _change(self, weight: Tensor, inverse: bool) -> _Change:
        blocks = (self.key_blocks.mT if inverse else self.key_blocks).to(weight.device)
        n, b, _ = blocks.shape

        def of(piece: Tensor, _: slice) -> Tensor:
            piece = piece.to(torch.float64)
            turned = piece.reshape(-1, n, b).transpose(0, 1) @ blocks
            return turned.transpose(0, 1).reshape(piece.shape) - piece

        return _Change(0, of, min(b, _WIDE))

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

    def _check(self, weight: Tensor) -> None:
        if weight.ndim != 2 or weight.shape[0] != self.basis.shape[0]:
            raise ValueError(
                f"A rotation of size {self.basis.shape[0]} does not fit a weight of shape {tuple(weight.shape)}; the "
                "first dimension must be the output's."
            )

    def _change(self, weight: Tensor, inverse: bool) -> _Change:
        basis, less = self.basis.to(weight.device), less_one(self.turn.T if inverse else self.turn).to(weight.device)
        return _Change(1, lambda piece, _: basis @ (less @ (basis.T @ piece.to(torch.float64))), _NARROW)

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

    def _check(self, weight: Tensor) -> None:
        if weight.ndim != 2 or weight.shape[1] != self.key_basis.shape[0]:
            raise ValueError(
                f"A key rotation of size {self.key_basis.shape[0]} does not fit a weight of shape "
                f"{tuple(weight.shape)}; the second dimension must be the input's."
            )

    def _change(self, weight: Tensor, inverse: bool) -> _Change:
        basis = self.key_basis.to(weight.device)
        less = less_one(self.key_turn.T if inverse else self.key_turn).to(weight.device)
        return _Change(0, lambda piece, _: (piece.to(torch.float64) @ basis) @ less @ basis.T, _NARROW)

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
