"""Subspaces of a weight's outputs: what edits so far have written to, and what the model's own gradient points to.

Pure functions on tensors, in float64; a weight is ``(d, p)`` = (d_out, d_in), a basis ``(d, n)`` has a vector a column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_edit.algebra.linalg import left_singular, svd_of_rank

_EPS = torch.finfo(torch.float64).eps
_NEGLIGIBLE = 1e-6  # of a unit vector: what is left of it after a projection is then rounding and no direction


def written_basis(weight: Tensor, original: Tensor, edits: int, eps: float | None = None) -> Tensor:
    r"""``V_r``: an orthonormal basis of the column space of all edits so far, ``W − W_0`` (O-Edit, Eq. 25).

    The rank ``r`` is at most the number of edits, each of which adds one column to the space, and counts only singular
    values that the rounding of the stored weights cannot explain: every write rounds every entry, which leaves a matrix
    of full rank and of a spectral norm below ``eps · √edits · ‖W‖_F · (1/√d + 1/√p)``.

    Args:
        weight: ``W (d, p)`` as it is now.
        original: ``W_0 (d, p)``, before the first edit.
        edits: Requests that were written into this weight.
        eps: Relative rounding of a write; that of the coarser of the two dtypes if None.

    Returns:
        ``(d, r)`` in float64, by descending singular value, the largest entry of each vector positive.

    Raises:
        ValueError: if the shapes differ or the number of edits is negative.
    """
    if weight.shape != original.shape or weight.ndim != 2:
        raise ValueError(
            f"A weight of shape {tuple(weight.shape)} cannot be compared with one of shape {tuple(original.shape)}."
        )
    if edits < 0:
        raise ValueError(f"The number of edits written into a weight cannot be {edits}.")
    d, p = weight.shape
    now, before = weight.detach().to(torch.float64), original.detach().to(torch.float64)
    total = now - before
    if not edits or not total.any():
        return total[:, :0]
    if eps is None:
        eps = max(torch.finfo(weight.dtype).eps, torch.finfo(original.dtype).eps)
    noise = eps * edits**0.5 * float(now.norm())
    rounding = noise * (d**-0.5 + p**-0.5)
    left, sizes, _ = svd_of_rank(total, edits, negligible=noise)
    rank = int((sizes > max(rounding, float(sizes[0]) * max(d, p) * _EPS)).sum())
    return _oriented(left[:, : min(rank, edits)])


def principal_directions(matrix: Tensor) -> Tensor:
    """Left singular vectors of a ``(d, p)`` matrix up to its numerical rank, by descending singular value.

    Returns:
        ``(d, rank)`` in float64, the largest entry of each vector positive.
    """
    left, sizes = left_singular(matrix)
    return _oriented(left[:, sizes > (sizes[:1] * max(matrix.shape) * _EPS)])


def cleaned(directions: Tensor, basis: Tensor) -> Tensor:
    """``V_q − V_r V_rᵀ V_q``: directions without their part in another space (O-Edit, Eq. 26).

    The result is not orthonormal: what loses a part gets shorter. A vector of which nothing is left is dropped.

    Args:
        directions: ``V_q (d, q)``, unit vectors.
        basis: ``V_r (d, r)``, orthonormal.

    Returns:
        ``(d, q')``, ``q' ≤ q``.
    """
    left = without(directions, basis)
    return left[:, left.norm(dim=0) > _NEGLIGIBLE]


def orthonormal(vectors: Tensor) -> Tensor:
    """An orthonormal basis of the space that vectors of length 1 at most span: ``(d, n)`` to ``(d, rank)``."""
    left, sizes, _ = torch.linalg.svd(vectors, full_matrices=False)
    return left[:, sizes > _NEGLIGIBLE]


def without(matrix: Tensor, basis: Tensor) -> Tensor:
    """``A − B Bᵀ A``; for an orthonormal ``B (d, n)`` the part of ``A (d, m)`` outside its space."""
    return matrix - basis @ (basis.T @ matrix)


def _oriented(vectors: Tensor) -> Tensor:
    """Singular vectors have no sign of their own: the largest entry is made positive, so that results repeat."""
    if not vectors.shape[1]:
        return vectors
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()
