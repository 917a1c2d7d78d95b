"""Linear algebra that the solvers share: pure functions on tensors, computed in float64.

Orientation is the same everywhere in the package: a weight is ``(d, p)`` = (d_out, d_in), keys are columns ``(p, n)``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps


class NotPositiveDefiniteError(ValueError):
    """A matrix that has to be positive definite is not, to the accuracy of float64."""


def _double_matrix(x: Tensor, name: str) -> Tensor:
    if x.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got shape {tuple(x.shape)}.")
    x = x.detach().to(torch.float64)
    if not torch.isfinite(x.sum()):
        raise ValueError(f"{name} of shape {tuple(x.shape)} holds values that are not finite.")
    return x


def _double_square(x: Tensor, name: str) -> Tensor:
    x = _double_matrix(x, name)
    if x.shape[0] != x.shape[1]:
        raise ValueError(f"{name} must be square, got shape {tuple(x.shape)}.")
    return x


def procrustes(m: Tensor) -> Tensor:
    r"""Orthogonal matrix nearest to ``m``: the maximiser of :math:`\mathrm{tr}(Q^\top M)` over ``O(d)``.

    With ``M = B Aᵀ`` it is also the minimiser of ``‖Q A − B‖_F`` (orthogonal Procrustes problem, Schönemann 1966; MOSE
    Eq. 18-20): ``M = U Σ Hᵀ`` gives ``Q = U Hᵀ``. The determinant may be −1, as the paper asks for ``O(d)``.

    Where ``M`` is singular many ``Q`` are optimal and the factors of an SVD pick one at random. Of them this function
    returns the one nearest to the identity, so directions that ``M`` says nothing about are turned as little as
    possible.

    Args:
        m: ``(d, d)``, any floating dtype.

    Returns:
        ``(d, d)`` in float64, orthogonal to rounding.

    Raises:
        ValueError: if ``m`` is not square or holds values that are not finite.
    """
    m = _double_square(m, "The matrix of a Procrustes problem")
    u, s, ht = torch.linalg.svd(m)
    rank = int((s > s[0] * len(s) * _EPS).sum()) if len(s) else 0
    if rank < len(s):
        # U₂ Z H₂ᵀ is optimal for every orthogonal Z; tr(U₂ Z H₂ᵀ) is largest, hence ‖Q − I‖ least, at the polar factor
        # of U₂ᵀ H₂. That matrix is small: as wide as M lacks in rank.
        a, _, bt = torch.linalg.svd(u[:, rank:].T @ ht[rank:].T)
        u = torch.cat([u[:, :rank], u[:, rank:] @ (a @ bt)], dim=1)
    return u @ ht


def orthogonality_error(q: Tensor) -> float:
    """Largest absolute entry of ``QᵀQ − I``; 0 for an exactly orthogonal ``(d, d)`` matrix.

    Raises:
        ValueError: if ``q`` is not square or holds values that are not finite.
    """
    q = _double_square(q, "The matrix to test for orthogonality")
    if not q.numel():
        return 0.0
    gram = q.T @ q
    gram.diagonal().sub_(1.0)
    return float(gram.abs().max())


def cholesky_spd(a: Tensor) -> Tensor:
    """Lower Cholesky factor of a symmetric positive definite ``(p, p)`` matrix, in float64.

    Nothing is added to the diagonal: a matrix that is singular to the accuracy of float64 is an error, because a hidden
    jitter would decide the size of an edit.

    Args:
        a: ``(p, p)``; only its lower triangle is read.

    Raises:
        ValueError: if it is not square or a value is not finite.
        NotPositiveDefiniteError: if it is not positive definite, with what to do about it.
    """
    a = _double_square(a, "The matrix of a linear system")
    factor, info = torch.linalg.cholesky_ex(a)
    pivot = int(info)
    # Rounding lets the factorisation of a singular matrix run through with pivots of pure noise: refuse those too.
    smallest, largest = float(factor.diagonal().min() ** 2), float(a.diagonal().max())
    if pivot or not smallest > len(a) * _EPS * largest:
        where = f"the factorisation stopped at row {pivot}" if pivot else f"its smallest pivot is {smallest:.1e}"
        raise NotPositiveDefiniteError(
            f"The {len(a)}x{len(a)} matrix to invert is not positive definite: {where}, its largest diagonal entry is "
            f"{largest:.1e}. Gather the key covariance over more tokens than its {len(a)} dimensions, or raise the "
            "ridge or preservation weight of the solver."
        )
    return factor


def fill_silent(covariance: Tensor) -> Tensor:
    """A covariance of keys that can be inverted where some inputs never fire.

    A unit of a ReLU network may be zero for every token there is, and more tokens would not help: its row and column
    are zero, and no solver could invert. On the diagonal it gets a millionth of the others' mean. A key that is zero
    there, as those of the corpus are, is edited as if the unit did not exist.

    Args:
        covariance: ``(p, p)``, symmetric positive semi-definite.

    Returns:
        A copy, or the tensor itself where every input fires, or none does.
    """
    diagonal = covariance.diagonal()
    silent = diagonal == 0
    if not bool(silent.any()) or bool(silent.all()):
        return covariance
    filled = covariance.clone()
    filled.diagonal()[silent] = 1e-6 * diagonal[~silent].mean()
    return filled


def solve_spd(a: Tensor, b: Tensor) -> Tensor:
    """Solve ``A X = B`` for a symmetric positive definite ``A`` by Cholesky factorisation.

    Args:
        a: ``(p, p)``, as for `cholesky_spd`.
        b: ``(p, n)``.

    Returns:
        ``(p, n)`` in float64.

    Raises:
        ValueError: if the shapes do not fit or a value is not finite.
        NotPositiveDefiniteError: if ``a`` is not positive definite, with what to do about it.
    """
    a = _double_square(a, "The matrix of a linear system")
    b = _double_matrix(b, "The right-hand side of a linear system")
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"A linear system of size {a.shape[0]} has a right-hand side of shape {tuple(b.shape)}.")
    return torch.cholesky_solve(b, cholesky_spd(a))


def check_null_space_choice(threshold: float | None, energy: float | None) -> None:
    """Check the two ways to choose a null space, as :func:`null_space_projector` takes them.

    Raises:
        ValueError: unless exactly one is given, a positive threshold or an energy share in [0, 1].
    """
    if (threshold is None) == (energy is None):
        raise ValueError(
            f"Give either a threshold or an energy share for the null space, and set the other to null; got "
            f"threshold={threshold}, energy={energy}."
        )
    if threshold is not None and not threshold > 0:
        raise ValueError(f"The eigenvalue threshold of a null space must be positive, got {threshold}.")
    if energy is not None and not 0 <= energy <= 1:
        raise ValueError(f"The energy share of a null space must lie between 0 and 1, got {energy}.")


def null_space_projector(
    covariance: Tensor, *, threshold: float | None = None, energy: float | None = None
) -> tuple[Tensor, int]:
    """Orthogonal projector on the directions that the preserved keys hardly use (AlphaEdit).

    Args:
        covariance: ``C = E[k kᵀ]``, ``(p, p)``, symmetric positive semi-definite.
        threshold: take the eigenvectors with an eigenvalue below this, in the units of ``covariance`` (squared
            activations per token); AlphaEdit uses 2e-2.
        energy: take the eigenvectors of the smallest eigenvalues that together hold at most this share of the trace, in
            [0, 1]. Unlike a threshold it does not depend on the scale of the activations.

    Returns:
        The projector ``P (p, p)`` in float64 and the dimension of its range, which may be 0.

    Raises:
        ValueError: unless exactly one of ``threshold`` and ``energy`` is given, in range, and ``covariance`` is a
            finite square matrix.
    """
    check_null_space_choice(threshold, energy)
    covariance = _double_square(covariance, "The key covariance")
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    if threshold is not None:
        inside = values < threshold
    if energy is not None:
        # Rounding makes zero eigenvalues slightly negative and lets their sum stray from the trace by the same amount.
        cumulated = values.clamp(min=0).cumsum(0)
        inside = cumulated <= energy * cumulated[-1] + len(values) * _EPS * cumulated[-1]
    dimension = int(inside.sum())
    basis = vectors[:, :dimension]
    return basis @ basis.T, dimension


@dataclass(frozen=True)
class SpectrumSummary:
    """How large and how well conditioned a weight is.

    Attributes:
        frobenius: Frobenius norm (MOSE Eq. 2).
        l1_norm: sum of absolute values (EAC's L1 norm), not the operator norm of that name.
        spectral_norm: largest singular value.
        smallest_singular_value: smallest of the ``min(d, p)`` singular values.
        condition_number: ratio of the last two (MOSE Eq. 3), infinite if the smallest is 0.
    """

    frobenius: float
    l1_norm: float
    spectral_norm: float
    smallest_singular_value: float
    condition_number: float

    def to_dict(self) -> dict[str, float]:
        """The fields as a plain dictionary, in the order above."""
        return asdict(self)


def spectrum_summary(weight: Tensor) -> SpectrumSummary:
    """Norms and condition number of a weight, from its singular values in float64.

    A Gram matrix would be cheaper, but squares the condition number: it leaves about 1e-8 relative accuracy at a
    condition number of 1e4, where the singular values leave 1e-12.

    Args:
        weight: ``(d, p)``, not empty.

    Raises:
        ValueError: if ``weight`` is not a matrix, is empty, or holds values that are not finite.
    """
    weight = _double_matrix(weight, "The weight")
    if not weight.numel():
        raise ValueError(f"The weight is empty: shape {tuple(weight.shape)}.")
    values = torch.linalg.svdvals(weight)
    largest, smallest = float(values[0]), float(values[-1])
    return SpectrumSummary(
        frobenius=float(torch.linalg.vector_norm(weight)),
        l1_norm=float(weight.abs().sum()),
        spectral_norm=largest,
        smallest_singular_value=smallest,
        condition_number=largest / smallest if smallest > 0 else float("inf"),
    )
