import math

import pytest
import torch
from helpers.sites import normal, orthogonal
from torch import Tensor

from lit_edit.algebra.linalg import (
    NotPositiveDefiniteError,
    left_singular,
    null_space_projector,
    orthogonality_error,
    procrustes,
    singular_values,
    solve_factored,
    solve_spd,
    spectral_norm,
    spectrum_summary,
    svd_of_rank,
)


def with_singular_values(d: int, p: int, values: Tensor, seed: int = 0) -> Tensor:
    n = min(d, p)
    return orthogonal(d, n, seed=seed) @ torch.diag(values) @ orthogonal(p, n, seed=seed + 1).T


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("d", [1, 2, 17, 40])
def test_procrustes_is_orthogonal_and_maximises_the_trace(d: int, seed: int) -> None:
    m = normal(d, d, seed=seed)
    q = procrustes(m)
    assert orthogonality_error(q) < 1e-12
    # At the maximum QᵀM is symmetric positive semi-definite, so the trace is the nuclear norm, which nothing exceeds.
    s = q.T @ m
    torch.testing.assert_close(s, s.T, rtol=0, atol=1e-11)
    assert torch.linalg.eigvalsh((s + s.T) / 2).min() > -1e-11
    assert float(torch.trace(s)) == pytest.approx(float(torch.linalg.svdvals(m).sum()), rel=1e-12)


def test_procrustes_recovers_a_rotation_may_reflect_and_takes_float32() -> None:
    q, a = orthogonal(12, 12), normal(12, 60, seed=5)
    torch.testing.assert_close(procrustes(q @ a @ a.T), q, rtol=0, atol=1e-12)
    reflection = torch.diag(torch.tensor([1.0, -1.0, 1.0]))
    torch.testing.assert_close(procrustes(reflection), reflection.double())
    assert orthogonality_error(procrustes(normal(10, 10).float())) < 1e-12


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_procrustes_turns_least_where_the_matrix_says_nothing(rank: int) -> None:
    d, a, b = 8, normal(8, 3, seed=1)[:, :rank], normal(8, 3, seed=2)[:, :rank]
    m = b @ a.T
    q = procrustes(m)
    assert orthogonality_error(q) < 1e-12
    assert float(torch.trace(q.T @ m)) == pytest.approx(float(torch.linalg.svdvals(m).sum()), abs=1e-11)
    # Only the span of both factors needs to turn.
    outside = torch.linalg.svd(torch.cat([a, b], dim=1)).U[:, 2 * rank :]
    assert outside.shape[1] == d - 2 * rank
    torch.testing.assert_close(q @ outside, outside, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("m", "message"),
    [
        (torch.ones(2, 3), r"must be square, got shape \(2, 3\)"),
        (torch.ones(3), r"must be a matrix, got shape \(3,\)"),
        (torch.full((2, 2), math.nan), r"shape \(2, 2\) holds values that are not finite"),
    ],
)
def test_procrustes_refuses(m: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        procrustes(m)


def test_orthogonality_error_is_the_largest_departure() -> None:
    q = torch.eye(4, dtype=torch.float64)
    assert orthogonality_error(q) == 0
    q[0, 0] = 1.1
    assert orthogonality_error(q) == pytest.approx(0.21)


@pytest.mark.parametrize("n", [1, 3])
def test_positive_definite_systems_are_solved(n: int) -> None:
    factor, b = normal(20, 50), normal(20, n, seed=9)
    a = factor @ factor.T
    torch.testing.assert_close(a @ solve_spd(a, b), b, rtol=0, atol=1e-11)
    torch.testing.assert_close(a @ solve_factored(torch.linalg.cholesky(a), b), b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rank", [1, 10, 19])
def test_solve_spd_refuses_a_singular_matrix_even_where_rounding_hides_it(rank: int) -> None:
    factor = normal(20, rank)
    with pytest.raises(
        NotPositiveDefiniteError, match=r"20x20 .* more tokens than its 20 dimensions, or raise the ridge"
    ):
        solve_spd(factor @ factor.T, torch.ones(20, 1))


def test_solve_spd_refuses_an_indefinite_matrix_and_shapes_that_do_not_fit() -> None:
    with pytest.raises(NotPositiveDefiniteError, match="stopped at row 2"):
        solve_spd(torch.diag(torch.tensor([1.0, -1.0])), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"size 3 has a right-hand side of shape \(2, 1\)"):
        solve_spd(torch.eye(3), torch.ones(2, 1))


VALUES = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.5], dtype=torch.float64)


def covariance() -> Tensor:
    q = orthogonal(6, 6, seed=3)
    return q @ torch.diag(VALUES) @ q.T


@pytest.mark.parametrize(
    ("choice", "dimension"),
    [
        ({"threshold": 0.4}, 0),
        ({"threshold": 1.5}, 3),
        ({"threshold": 100.0}, 6),
        ({"energy": 0.0}, 0),
        ({"energy": 0.04}, 1),
        ({"energy": 0.0625}, 2),  # exactly 1 of 16
        ({"energy": 0.2}, 3),
        ({"energy": 1.0}, 6),
    ],
)
def test_null_space_is_chosen_by_threshold_or_energy(choice: dict[str, float], dimension: int) -> None:
    c = covariance()
    projector, found = null_space_projector(c, **choice)
    assert found == dimension
    torch.testing.assert_close(projector, projector.T)
    torch.testing.assert_close(projector @ projector, projector, rtol=0, atol=1e-13)
    torch.testing.assert_close(projector @ c, c @ projector, rtol=0, atol=1e-12)
    assert float(torch.trace(projector)) == pytest.approx(dimension)
    expected = VALUES.flip(0)[:dimension].sum()
    assert float(torch.trace(projector @ c)) == pytest.approx(float(expected), abs=1e-12)


def test_energy_zero_takes_the_exact_null_space() -> None:
    keys = normal(10, 4)
    projector, dimension = null_space_projector(keys @ keys.T, energy=0.0)
    assert dimension == 6
    torch.testing.assert_close(projector @ keys, torch.zeros_like(keys), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, "threshold=None, energy=None"),
        ({"threshold": 1.0, "energy": 0.1}, "threshold=1.0, energy=0.1"),
        ({"threshold": 0.0}, "must be positive, got 0.0"),
        ({"energy": 1.5}, "between 0 and 1, got 1.5"),
    ],
)
def test_null_space_refuses_unclear_choices(choice: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        null_space_projector(covariance(), **choice)


@pytest.mark.parametrize(("d", "p"), [(12, 30), (30, 12), (16, 16), (1, 5)])
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e4])
def test_spectrum_summary_knows_the_condition_number_to_1e_6(d: int, p: int, condition: float) -> None:
    n = min(d, p)
    values = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64) * 3
    weight = with_singular_values(d, p, values, seed=d + p)
    summary = spectrum_summary(weight)
    assert summary.spectral_norm == pytest.approx(3.0, rel=1e-9)
    assert summary.smallest_singular_value == pytest.approx(float(values[-1]), rel=1e-9)
    assert summary.condition_number == pytest.approx(3.0 / float(values[-1]), rel=1e-9)
    assert summary.frobenius == pytest.approx(math.sqrt(sum(float(v) ** 2 for v in values)), rel=1e-12)
    assert summary.l1_norm == pytest.approx(sum(abs(float(x)) for x in weight.flatten()), rel=1e-12)


def test_spectrum_summary_of_a_singular_and_of_an_empty_weight() -> None:
    summary = spectrum_summary(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    assert summary.to_dict() == {
        "frobenius": 2.0,
        "l1_norm": 2.0,
        "spectral_norm": 2.0,
        "smallest_singular_value": 0.0,
        "condition_number": math.inf,
    }
    with pytest.raises(ValueError, match=r"empty: shape \(0, 4\)"):
        spectrum_summary(torch.ones(0, 4))


@pytest.mark.parametrize(("d", "p"), [(24, 60), (60, 24), (24, 24)])
@pytest.mark.parametrize("condition", [3.0, 900.0, 1e5, 1e12])  # by the Gram matrix below 1,000, by QR above
def test_singular_values_are_those_of_the_svd(d: int, p: int, condition: float) -> None:
    matrix = with_singular_values(d, p, torch.logspace(0, -math.log10(condition), 24, dtype=torch.float64))
    wanted = torch.linalg.svdvals(matrix)
    found = singular_values(matrix)
    tolerance = 1e-9 if condition < 1000 else 1e-13 * condition
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=0)


def test_singular_values_of_matrices_at_the_edge() -> None:
    torch.testing.assert_close(singular_values(torch.zeros(3, 5)), torch.zeros(3, dtype=torch.float64))
    huge = torch.diag(torch.tensor([1e200, 1e190], dtype=torch.float64))  # whose squares are not finite
    torch.testing.assert_close(singular_values(huge), huge.diagonal())
    assert singular_values(torch.zeros(0, 5)).shape == (0,)


@pytest.mark.parametrize("shape", [(80, 120), (120, 80)])
def test_svd_of_rank_is_the_svd_of_a_matrix_of_that_rank(shape: tuple[int, int]) -> None:
    left, right = (normal(n, 6, seed=n) for n in shape)
    matrix = (left * torch.logspace(0, -5, 6).double()) @ right.T
    u, sigma, vt = svd_of_rank(matrix, 6, negligible=1e-10)
    assert len(sigma) < min(shape)  # the quick way was taken
    torch.testing.assert_close(sigma[:6], torch.linalg.svdvals(matrix)[:6], rtol=1e-9, atol=0)
    torch.testing.assert_close((u * sigma) @ vt, matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(u.T @ u, torch.eye(len(sigma), dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(80, 120), (120, 80)])
def test_svd_of_rank_takes_everything_where_the_rank_is_higher_than_said(shape: tuple[int, int]) -> None:
    matrix = normal(*shape)
    u, sigma, vt = svd_of_rank(matrix, 3, negligible=1e-6)
    torch.testing.assert_close((u * sigma) @ vt, matrix, rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="rank of a matrix cannot be -1"):
        svd_of_rank(matrix, -1, 1e-6)


def test_left_singular_leaves_the_right_ones_out() -> None:
    matrix = normal(12, 40)
    left, sizes = left_singular(matrix)
    torch.testing.assert_close(sizes, torch.linalg.svdvals(matrix))
    torch.testing.assert_close(left @ torch.diag(sizes**2) @ left.T, matrix @ matrix.T)


@pytest.mark.parametrize(("d", "p"), [(40, 90), (200, 450), (450, 200)])
@pytest.mark.parametrize("decay", [0.0, 0.01, 3.0])  # all but equal values are the hardest to tell apart
def test_spectral_norm_is_the_largest_singular_value(d: int, p: int, decay: float) -> None:
    values = torch.logspace(0.5, 0.5 - decay, min(d, p), dtype=torch.float64)
    matrix = with_singular_values(d, p, values)
    assert spectral_norm(matrix) == pytest.approx(10**0.5, rel=1e-9)
    assert spectral_norm(torch.zeros(d, p)) == 0.0


def test_spectral_norm_of_random_matrices_and_of_none() -> None:
    for seed in range(3):
        matrix = normal(160, 300, seed=seed)
        assert spectral_norm(matrix) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-9)
    with pytest.raises(ValueError, match=r"shape \(0, 3\) has no spectral norm"):
        spectral_norm(torch.zeros(0, 3))
