"""Weights as the numbers they stand for, in float64 and piece by piece: no copy of a whole weight is made.

What rounding to 16 bits took of a weight can be kept beside it as a *remainder*, 16 more bits per entry, so that both
together are as good as float32. A bfloat16 number is the upper half of a float32 number: its remainder is the lower
half, as the difference of the two bit patterns (int16). That of a float16 number is a float16 number as well, times
2¹¹: unscaled, what rounding takes of small entries would be subnormal, and scaled by more, that of large ones would
overflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Entries of a piece. In float64 the few that are alive at a time stay in a core's caches; an accelerator has to be kept
# busy by each.
_ON_CPU, _ELSEWHERE = 1 << 17, 1 << 24
_REMAINDERS = {torch.bfloat16: torch.int16, torch.float16: torch.float16}
_MOST_BITS, _SCALE = 2**15 - 1, 2.0**11
_NARROW, _WIDE = 64, 512  # columns, or rows, that are worth an access, or a product with a large matrix


def pieces(weight: Tensor, dim: int, width: int = 1) -> Iterator[slice]:
    """Slices that together make up a dimension of a weight, in order.

    Args:
        weight: ``(d, p)``.
        dim: 0 for slices of rows, 1 for slices of columns.
        width: Smallest number of rows or columns in each piece but the last.
    """
    length, other = weight.shape[dim], max(weight.shape[1 - dim], 1)
    step = max((_ON_CPU if weight.device.type == "cpu" else _ELSEWHERE) // other, width, 1)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def part(weight: Tensor, dim: int, place: slice) -> Tensor:
    """The rows (``dim`` 0) or columns (1) of a weight in one place, as a view."""
    return weight.narrow(dim, place.start, place.stop - place.start)


def stored_along(weight: Tensor) -> int:
    """The dimension whose slices lie in one piece of memory: 0, or 1 for the view of a weight stored transposed."""
    return 0 if weight.stride(0) >= weight.stride(1) else 1


def can_have_remainder(dtype: torch.dtype) -> bool:
    """Whether what is rounded to a dtype can be kept beside it."""
    return dtype in _REMAINDERS


def no_remainder(weight: Tensor) -> Tensor:
    """The remainder of a weight (d, p) that nothing was taken of."""
    return torch.zeros_like(weight, dtype=_REMAINDERS[weight.dtype])


def remainder_of(exact: Tensor, rounded: Tensor) -> Tensor:
    """What rounding took of a matrix in float64: what `widened` needs to find it again, to 24 binary digits.

    Args:
        exact: The exact weight before the write.
        rounded: The weight rounded to bfloat16 or float16; finite.
    """
    if rounded.dtype == torch.bfloat16:
        lower = exact.to(torch.float32).view(torch.int32) - rounded.to(torch.float32).view(torch.int32)
        return lower.clamp_(-_MOST_BITS, _MOST_BITS).to(torch.int16)  # half way between two numbers it is one more
    return (exact - rounded).mul_(_SCALE).to(torch.float16)


def widened(stored: Tensor, remainder: Tensor | None) -> Tensor:
    """What is stored and its remainder together, as a new matrix in float64."""
    if remainder is None:
        return stored.to(torch.float64, copy=True)
    if stored.dtype == torch.bfloat16:
        bits = stored.to(torch.float32).view(torch.int32) + remainder
        return bits.view(torch.float32).to(torch.float64)
    return stored.to(torch.float64).add_(remainder, alpha=1 / _SCALE)


@dataclass(frozen=True, eq=False)
class ExactWeight:
    """A weight to compute with in float64, without a copy of it in float64.

    Args:
        stored: ``W (d, p)`` in the model's dtype.
        remainder: (d, p), what rounding took of it; None if that is not known.
    """

    stored: Tensor
    remainder: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(d, p)``."""
        d, p = self.stored.shape
        return d, p

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.stored.device

    def piece(self, dim: int, place: slice) -> Tensor:
        """Its rows (``dim`` 0) or columns (1) in one place, in float64."""
        stored = part(self.stored.detach(), dim, place)
        if self.remainder is None:
            return stored.to(torch.float64)
        return widened(stored, part(self.remainder, dim, place))

    def dense(self) -> Tensor:
        """All of it, ``(d, p)`` in float64: the stored tensor itself where that is its dtype."""
        stored = self.stored.detach()
        return stored.to(torch.float64) if self.remainder is None else widened(stored, self.remainder)

    @property
    def eps(self) -> float:
        """The distance of 1 from the next number that can be told from it, if no write was without a remainder."""
        return torch.finfo(self.stored.dtype if self.remainder is None else torch.float32).eps

    def norm(self) -> float:
        """Frobenius norm."""
        along = stored_along(self.stored)
        return math.hypot(*(float(self.piece(along, place).norm()) for place in pieces(self.stored, along)))

    def __matmul__(self, x: Tensor) -> Tensor:
        """``W X (d, n)`` for ``X (p, n)`` or a vector (p,), in float64."""
        x = x.to(self.stored.device, torch.float64)
        if self._at_once:
            return self.dense() @ x
        found = x.new_empty(self.shape[0], *x.shape[1:])  # small results between the pieces would fragment the memory
        for place in pieces(self.stored, 0):
            found[place] = self.piece(0, place) @ x
        return found

    def back(self, y: Tensor) -> Tensor:
        """``Wᵀ Y (p, n)`` for ``Y (d, n)``, in float64."""
        y = y.to(self.stored.device, torch.float64)
        if self._at_once:
            return self.dense().T @ y
        found = y.new_empty(self.shape[1], *y.shape[1:])
        for place in pieces(self.stored, 1, _NARROW):
            found[place] = self.piece(1, place).T @ y
        return found

    def spread(self, c: Tensor) -> Tensor:
        """``W C Wᵀ (d, d)`` in float64, for a symmetric ``C (p, p)``."""
        c = c.detach().to(self.stored.device, torch.float64)
        d = self.shape[0]
        if self._at_once or d <= _WIDE:
            dense = self.dense()
            return dense @ c @ dense.T
        found = c.new_empty(d, d)
        places = list(pieces(self.stored, 0, _WIDE))
        for i, place in enumerate(places):
            half = self.piece(0, place) @ c
            for other in places[: i + 1]:
                block = half @ self.piece(0, other).T
                found[place, other], found[other, place] = block, block.T
        return found

    @property
    def _at_once(self) -> bool:
        """Whether there is no copy to be saved."""
        return self.stored.dtype == torch.float64
