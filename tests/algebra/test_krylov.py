"""The thin Procrustes solution against the dense one."""

from __future__ import annotations

import pytest
import torch
from helpers.sites import normal, orthogonal
from torch import Tensor

from lit_edit.algebra.krylov import Preserved, ThinSolution, procrustes_near_identity
from lit_edit.algebra.linalg import procrustes


def problem(d: int, n: int, m: int, condition: float) -> tuple[Preserved, Tensor, Tensor]:
    """S with a spectrum spread evenly in the logarithm and m columns on top; n pairs of equal length."""
    q = orthogonal(d, d)
    values = torch.logspace(0, float(torch.log10(torch.tensor(condition))), d, dtype=torch.float64) / condition
    root = q * values.sqrt()
    memory = root @ normal(d, m, seed=1)
    right = root @ normal(d, n, seed=2)
    left = normal(d, n, seed=3)
    left = left / left.norm(dim=0) * right.norm(dim=0)
    preserved = Preserved.of((q * values) @ q.T)
    return (preserved.with_columns(memory) if m else preserved), left, right


def dense(solution: ThinSolution) -> Tensor:
    d, k = solution.basis.shape
    turn = solution.turn - torch.eye(k, dtype=torch.float64)
    return torch.eye(d, dtype=torch.float64) + solution.basis @ turn @ solution.basis.T


@pytest.mark.parametrize(("n", "m"), [(1, 0), (1, 12), (3, 0), (3, 5)])
@pytest.mark.parametrize("condition", [10.0, 1e6, 1e10])
def test_the_objective_is_that_of_the_dense_solution(n: int, m: int, condition: float) -> None:
    preserved, left, right = problem(192, n, m, condition)
    matrix = preserved.dense() + left @ right.T
    best = float(torch.linalg.svdvals(matrix).sum())
    solution = procrustes_near_identity(preserved, left, right)
    q = dense(solution)
    assert float((q.T @ q - torch.eye(192, dtype=torch.float64)).abs().max()) < 1e-13
    reached = float((q * matrix).sum())
    assert (best - reached) / best < 1e-9
    assert (best - reached) / best <= 10 * solution.gap + 1e-12  # the estimate says what it is
    assert float((q - procrustes(matrix)).norm()) < 1e-2 * float(q.norm())
    assert float((q - torch.eye(192, dtype=torch.float64)).norm()) > 0.3


def test_a_wide_batch_spans_everything_and_is_exact() -> None:
    preserved, left, right = problem(48, 8, 3, 1e4)
    q = dense(procrustes_near_identity(preserved, left, right))
    torch.testing.assert_close(q, procrustes(preserved.dense() + left @ right.T), rtol=0, atol=1e-9)


def test_nothing_new_leaves_everything_where_it_is() -> None:
    preserved, left, right = problem(64, 2, 4, 1e3)
    preserved = preserved.with_columns(right)
    q = dense(procrustes_near_identity(preserved, right, right))
    torch.testing.assert_close(q, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-9)
    assert left.shape == right.shape


def test_directions_that_hold_nothing_do_no_harm() -> None:
    preserved, left, right = problem(64, 1, 0, 1e4)
    values = preserved.values.clone()
    values[:5] = 0
    flat = Preserved(values, preserved.vectors, preserved.factor)
    solution = procrustes_near_identity(flat, left, right)
    matrix = flat.dense() + left @ right.T
    best = float(torch.linalg.svdvals(matrix).sum())
    assert (best - float((dense(solution) * matrix).sum())) / best < 1e-9


def test_folding_turning_and_adding_columns_keep_the_matrix() -> None:
    preserved, left, right = problem(40, 2, 6, 1e4)
    matrix = preserved.dense()
    torch.testing.assert_close(preserved.folded().dense(), matrix, rtol=1e-10, atol=1e-12)
    assert preserved.folded().factor.shape[1] == 0
    more = preserved.with_columns(left)
    torch.testing.assert_close(more.dense(), matrix + left @ left.T, rtol=1e-10, atol=1e-12)
    solution = procrustes_near_identity(more, left, right)
    q = dense(solution)
    turned = more.turned(solution.basis, solution.turn)
    torch.testing.assert_close(turned.dense(), q @ more.dense() @ q.T, rtol=1e-10, atol=1e-12)


def test_bad_shapes_and_an_empty_gram_are_refused() -> None:
    preserved, left, right = problem(16, 2, 0, 10.0)
    with pytest.raises(ValueError, match=r"must both be \(16, n\), got \(16, 2\) and \(16, 1\)"):
        procrustes_near_identity(preserved, left, right[:, :1])
    with pytest.raises(ValueError, match="Nothing is preserved"):
        procrustes_near_identity(Preserved.of(torch.zeros(16, 16)), left, right)
