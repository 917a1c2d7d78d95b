"""Linear algebra that the solvers share: pure functions on tensors, computed in float64.

Orientation is the same everywhere in the package: a weight is ``(d, p)`` = (d_out, d_in), keys are columns ``(p, n)``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps
_GRAM_RATIO = 1e-6  # smallest over largest eigenvalue of a Gram matrix that is still accurate enough
_SMALL = 128  # width of matrices whose factorisation takes no time
_LOOK_EVERY = 8  # steps of Lanczos' method: to look whether it has ended costs more than a step
_LANCZOS = 1e-10  # of the eigenvalue sought
_SPARE = 8  # columns of a random subspace beyond the rank looked for


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


def less_one(q: Tensor) -> Tensor:
    """``Q − I``, for a square ``Q``."""
    less = q.clone()
    less.diagonal().sub_(1.0)
    return less


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


def solve_factored(factor: Tensor, b: Tensor) -> Tensor:
    """Solve ``L Lᵀ X = B`` for the lower triangular ``L (p, p)`` of a Cholesky factorisation and ``B (p, n)``.

    By two triangular solves, which for few right-hand sides take an eighth of the time of `torch.cholesky_solve`.
    """
    half = torch.linalg.solve_triangular(factor, b, upper=False)
    return torch.linalg.solve_triangular(factor.T, half, upper=True)


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
    return solve_factored(cholesky_spd(a), b)


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
        threshold: Take the eigenvectors with an eigenvalue below this, in the units of ``covariance`` (squared
            activations per token); AlphaEdit uses 2e-2.
        energy: Take the eigenvectors of the smallest eigenvalues that together hold at most this share of the trace, in
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


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values of a matrix, descending, several times faster than by its SVD.

    From the eigenvalues of the smaller Gram matrix where the condition number is below 1,000: every value is then
    accurate to 1e-9, relative to itself. Elsewhere from the triangular factor of a QR factorisation, to rounding
    relative to the largest.

    Args:
        matrix: ``(d, p)``, any floating dtype.

    Returns:
        ``(min(d, p),)`` in float64, on the device of the matrix.

    Raises:
        ValueError: if it is not a matrix or holds values that are not finite.
    """
    matrix = _double_matrix(matrix, "The matrix")
    tall = matrix.T if matrix.shape[0] < matrix.shape[1] else matrix
    gram = tall.T @ tall
    if gram.numel() and bool(torch.isfinite(gram).all()):
        squares = torch.linalg.eigvalsh(gram)
        if float(squares[0]) > _GRAM_RATIO * float(squares[-1]):
            return squares.flip(0).sqrt()
    return torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R)


def spectral_norm(matrix: Tensor) -> float:
    """``‖A‖₂``, the largest singular value, to a relative accuracy of 1e-10.

    By Lanczos' method on the smaller Gram matrix, with every vector kept orthogonal to all others: a few dozen products
    with ``A`` and ``Aᵀ`` take the place of a factorisation. A small matrix is factorised.

    Args:
        matrix: ``(d, p)``, any floating dtype.

    Raises:
        ValueError: if it is not a matrix, is empty or holds values that are not finite.
    """
    matrix = _double_matrix(matrix, "The matrix")
    n = min(matrix.shape)
    if not n:
        raise ValueError(f"A matrix of shape {tuple(matrix.shape)} has no spectral norm.")
    if n <= _SMALL:
        return float(singular_values(matrix)[0])
    tall = matrix.T if matrix.shape[0] < matrix.shape[1] else matrix
    start = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(matrix.device)
    basis, diagonal, below = [start / start.norm()], [], []
    for _ in range(n):
        step = tall.T @ (tall @ basis[-1])
        diagonal.append(float(basis[-1] @ step))
        stacked = torch.stack(basis)
        for _ in range(2):  # once leaves rounding behind
            step = step - stacked.T @ (stacked @ step)
        below.append(float(step.norm()))
        if below[-1] and len(basis) % _LOOK_EVERY:
            basis.append(step / below[-1])
            continue
        small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        small += torch.diag(torch.tensor(below[:-1], dtype=torch.float64), -1)
        values, vectors = torch.linalg.eigh(small)
        # The residual bounds the error of an eigenvalue; its square over the gap, still less, is what it is.
        if below[-1] * abs(float(vectors[-1, -1])) <= _LANCZOS * float(values[-1]):
            return max(float(values[-1]), 0.0) ** 0.5
        basis.append(step / below[-1])
    return float(singular_values(matrix)[0])


def left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors ``(d, min(d, p))`` and singular values, descending, of a ``(d, p)`` matrix, in float64.

    The right ones, of which a wide matrix has many, are not formed.
    """
    matrix = _double_matrix(matrix, "The matrix")
    if matrix.shape[0] < matrix.shape[1]:
        matrix = torch.linalg.qr(matrix.T, mode="r").R.T
    left, sizes, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left, sizes


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of a ``(d, p)`` matrix in float64: ``U (d, r)``, ``σ (r,)`` descending, ``Vᵀ (r, p)``, ``r = min(d, p)``.

    The same as `torch.linalg.svd`, which takes twice as long for a wide matrix as for its transpose.
    """
    matrix = _double_matrix(matrix, "The matrix")
    if matrix.shape[0] < matrix.shape[1]:
        right, sizes, left = torch.linalg.svd(matrix.T, full_matrices=False)
        return left.T, sizes, right.T
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, sizes, right


def svd_of_rank(matrix: Tensor, rank: int, negligible: float) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of a matrix that is of low rank but for rounding: ``U (d, r)``, ``σ (r,)`` and ``Vᵀ (r, p)``.

    A random subspace is drawn to the matrix's range by one power iteration (Halko, Martinsson and Tropp 2011, Algorithm
    4.4, with a fixed seed), which is exact for a matrix of that rank. What is outside of it is measured: if it is more
    than negligible, or the rank is no longer low, the full SVD is taken.

    Args:
        matrix: ``(d, p)``, any floating dtype.
        rank: Bound on the rank, apart from rounding.
        negligible: Frobenius norm of what may be left out. A singular value ``σ`` is then off by less than its square
            over ``σ``.

    Raises:
        ValueError: if it is not a matrix, holds values that are not finite, or the rank is negative.
    """
    matrix = _double_matrix(matrix, "The matrix")
    if rank < 0:
        raise ValueError(f"The rank of a matrix cannot be {rank}.")
    width = rank + _SPARE
    if 4 * width < min(matrix.shape):
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float64).to(matrix.device)
        basis = torch.linalg.qr(matrix @ start).Q
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        inside = basis.T @ matrix
        if float(torch.linalg.vector_norm(matrix - basis @ inside)) <= negligible:
            left, sizes, right = torch.linalg.svd(inside, full_matrices=False)
            return basis @ left, sizes, right
    return thin_svd(matrix)


@dataclass(frozen=True)
class SpectrumSummary:
    """How large and how well conditioned a weight is.

    Attributes:
        frobenius: Frobenius norm (MOSE Eq. 2).
        l1_norm: Sum of absolute values (EAC's L1 norm), not the operator norm of that name.
        spectral_norm: Largest singular value.
        smallest_singular_value: Smallest of the ``min(d, p)`` singular values.
        condition_number: Ratio of the last two (MOSE Eq. 3), infinite if the smallest is 0.
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
    """Norms and condition number of a weight, from its `singular_values`.

    Args:
        weight: ``(d, p)``, not empty.

    Raises:
        ValueError: if ``weight`` is not a matrix, is empty, or holds values that are not finite.
    """
    weight = _double_matrix(weight, "The weight")
    if not weight.numel():
        raise ValueError(f"The weight is empty: shape {tuple(weight.shape)}.")
    values = singular_values(weight)
    largest, smallest = float(values[0]), float(values[-1])
    return SpectrumSummary(
        frobenius=float(torch.linalg.vector_norm(weight)),
        l1_norm=float(weight.abs().sum()),
        spectral_norm=largest,
        smallest_singular_value=smallest,
        condition_number=largest / smallest if smallest > 0 else float("inf"),
    )
