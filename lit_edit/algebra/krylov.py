r"""Orthogonal Procrustes problems whose matrix is positive definite but for a few columns, without a dense SVD.

The matrix of an edit is :math:`M = S + V A^\top`: `S` preserves what is known, symmetric positive definite and ``d``
wide, ``V`` and ``A`` are as thin as the batch. For ``V = 0`` the solution is the identity, and :math:`Q - I` has a
numerical rank of about ``n log κ(S)`` whatever ``d`` is. Its range lies, to any accuracy, in the rational Krylov
space that resolvents of ``S`` span from ``V`` and ``A``. Within an orthonormal basis ``B (d, k)`` of it the problem is
``k`` wide, and :math:`Q = I + B (T - I) B^\top` is orthogonal to rounding by construction.

Eigenvectors of ``S`` are needed once. Whatever is added to ``S`` later, a column per remembered key, enters the
resolvents by the Woodbury identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_edit.algebra.linalg import less_one, procrustes

_FLOOR = 1e-14  # eigenvalues below this share of the largest are rounding
_SHIFTS_PER_DECADE = 2.7
_ACCURACY_OF_HALF = 2 / 3  # with twice the shifts the gap g becomes about g^(3/2)


@dataclass(frozen=True, eq=False)
class Preserved:
    """``S = U (diag(values) + F Fᵀ) Uᵀ``, symmetric positive semi-definite, all in float64.

    Args:
        values: (d,), at least 0.
        vectors: ``U (d, d)``, orthogonal.
        factor: ``F (d, m)``, in the basis of ``vectors``.
    """

    values: Tensor
    vectors: Tensor
    factor: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> Preserved:
        """From a dense symmetric positive semi-definite ``S (d, d)``, by one eigendecomposition."""
        values, vectors = torch.linalg.eigh(gram.detach().to(torch.float64))
        return cls(values.clamp_min(0), vectors, vectors[:, :0])

    def with_columns(self, columns: Tensor) -> Preserved:
        """``S + columns columnsᵀ``, for columns (d, m)."""
        return Preserved(self.values, self.vectors, torch.cat([self.factor, self.vectors.T @ columns], dim=1))

    def folded(self) -> Preserved:
        """The same ``S`` without a factor, by an eigendecomposition."""
        gram = torch.diag(self.values).addmm_(self.factor, self.factor.T)
        inner = Preserved.of(gram)
        return Preserved(inner.values, self.vectors @ inner.vectors, inner.factor)

    def turned(self, basis: Tensor, turn: Tensor) -> Preserved:
        """``Q S Qᵀ`` for ``Q = I + basis (turn − I) basisᵀ``: the eigenvectors turn, nothing else changes."""
        return Preserved(self.values, self.vectors + basis @ less_one(turn) @ (basis.T @ self.vectors), self.factor)

    def dense(self) -> Tensor:
        """``S (d, d)``."""
        inner = torch.diag(self.values).addmm_(self.factor, self.factor.T)
        return self.vectors @ inner @ self.vectors.T


@dataclass(frozen=True, eq=False)
class ThinSolution:
    """``Q = I + basis (turn − I) basisᵀ``, the solution of an orthogonal Procrustes problem.

    Args:
        basis: (d, k), orthonormal columns.
        turn: (k, k), orthogonal.
        gap: Estimate of how far ``tr(Qᵀ M)`` stays below its maximum, relative to it.
    """

    basis: Tensor
    turn: Tensor
    gap: float


def procrustes_near_identity(
    preserved: Preserved, left: Tensor, right: Tensor, tolerance: float = 1e-10
) -> ThinSolution:
    r"""Maximises ``tr(Qᵀ M)`` over orthogonal ``Q`` for ``M = S + left rightᵀ``.

    The number of shifts follows from the spread of the spectrum. Half of them span a subspace of the other's; what the
    second half still gained says whether all together are enough, and if not their number is doubled.

    Args:
        preserved: ``S (d, d)``.
        left: ``V (d, n)``.
        right: ``A (d, n)``.
        tolerance: Tolerance of the relative gap in the objective.

    Raises:
        ValueError: if the shapes do not fit.
    """
    d = len(preserved.values)
    if left.shape != right.shape or left.ndim != 2 or left.shape[0] != d:
        raise ValueError(f"left and right must both be ({d}, n), got {tuple(left.shape)} and {tuple(right.shape)}.")
    u = preserved.vectors
    v, a = u.T @ left.to(torch.float64), u.T @ right.to(torch.float64)
    factor = preserved.factor
    largest = float(preserved.values.max())
    largest += float(factor.square().sum())  # no less than its largest eigenvalue adds
    smallest = max(float(preserved.values.min()), _FLOOR * largest)
    if not largest > 0:
        raise ValueError("Nothing is preserved: S is zero, and every rotation that fits the edit is as good.")
    shifts = 4 * math.ceil(max(8.0, _SHIFTS_PER_DECADE * math.log10(largest / smallest)) / 4)
    while True:
        basis, half = _basis(preserved, v, a, _log_spaced(smallest, largest, shifts))
        solution, score = _within(preserved, v, a, basis)
        if basis.shape[1] >= d:
            gap = 0.0
            break
        _, before = _within(preserved, v, a, basis[:, :half])
        gained = float((score - before) / score.abs())
        gap = max(gained, 0.0) ** (1 / _ACCURACY_OF_HALF)
        if gap <= tolerance:
            break
        shifts *= 2
    return ThinSolution(_orthonormal(u @ basis), solution, gap)


def _orthonormal(basis: Tensor) -> Tensor:
    """A step of Newton and Schulz: orthonormal to rounding, for columns that nearly are.

    Eigenvectors that are turned again and again lose some of it, and a turn by a basis that is not orthonormal would
    double what they have lost.
    """
    return 1.5 * basis - 0.5 * (basis @ (basis.T @ basis))


def _log_spaced(smallest: float, largest: float, n: int) -> list[float]:
    low, high = math.log(smallest), math.log(largest)
    return [math.exp(low + (high - low) * i / (n - 1)) for i in range(n)]


def _basis(preserved: Preserved, v: Tensor, a: Tensor, shifts: list[float]) -> tuple[Tensor, int]:
    """An orthonormal basis (d, k) in the eigenbasis, and how many of its columns every other shift spans."""
    s, factor = preserved.values, preserved.factor.to(torch.complex128)
    floor = _FLOOR * float(s.max())
    start = torch.cat([s[:, None] * v + preserved.factor @ (preserved.factor.T @ v), a], dim=1).to(torch.complex128)

    def resolvent(shift: float, x: Tensor) -> Tensor:
        """(S − i·shift)⁻¹ x: its real and imaginary parts are S (shift² + S²)⁻¹ x and shift (shift² + S²)⁻¹ x."""
        inverse = 1 / torch.complex(s.clamp_min(floor), torch.full_like(s, -shift))
        found = inverse[:, None] * x
        if not factor.shape[1]:
            return found
        scaled = inverse[:, None] * factor
        inner = factor.T @ scaled
        inner.diagonal().add_(1.0)
        return found - scaled @ torch.linalg.solve(inner, factor.T @ found)

    columns = [v, a, resolvent(0.0, a.to(torch.complex128)).real]
    every_other = 0
    for chosen in (shifts[::2], shifts[1::2]):
        for shift in chosen:
            found = resolvent(shift, start)
            columns += [found.real, found.imag]
        every_other = every_other or sum(c.shape[1] for c in columns)
    stacked = torch.cat(columns, dim=1)
    # Householder's QR gives orthonormal columns also where the given ones nearly depend on each other.
    lengths = torch.linalg.vector_norm(stacked, dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.linalg.qr(stacked / lengths).Q, every_other


def _within(preserved: Preserved, v: Tensor, a: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The best turn within a basis, and ``tr(Qᵀ M)``."""
    s, factor = preserved.values, preserved.factor
    inside = factor.T @ basis
    known = basis.T @ (s[:, None] * basis) + inside.T @ inside
    matrix = known + (basis.T @ v) @ (a.T @ basis)
    turn = procrustes(matrix)  # where S has a null space, the one that turns it least
    everything = s.sum() + factor.square().sum()
    return turn, everything + ((turn * matrix).sum() - known.trace())
