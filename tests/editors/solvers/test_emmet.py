import pytest
import torch
from torch import Tensor

from lit_edit.algebra.linalg import NotPositiveDefiniteError
from lit_edit.editors.solvers import EMMET, MEMIT, ROME

SHAPES = [(12, 24), (16, 48), (40, 96), (24, 24)]


def least_change_by_kkt(gram: Tensor, keys: Tensor, residual: Tensor) -> Tensor:
    """Minimise tr(X G Xᵀ) subject to X K = R, from its optimality conditions: one bordered system for all rows."""
    p, n = keys.shape
    system = torch.zeros(p + n, p + n, dtype=torch.float64)
    system[:p, :p], system[:p, p:], system[p:, :p] = 2 * gram, keys, keys.T
    right = torch.cat([torch.zeros(p, len(residual), dtype=torch.float64), residual.T])
    return torch.linalg.solve(system, right)[:p].T


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("d", "p"), SHAPES)
@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("memory", [False, True])
def test_every_fact_is_written_exactly_with_the_least_change(
    make_problem, d: int, p: int, n: int, seed: int, memory: bool
) -> None:
    problem = make_problem(d, p, n, 5, seed=seed)
    delta = EMMET(preservation=3.0, memory=memory).solve(problem).delta(problem.weight)
    torch.testing.assert_close((problem.weight + delta) @ problem.keys, problem.targets, rtol=0, atol=1e-9)
    gram = 3 * problem.covariance
    if memory:
        gram = gram + problem.memory @ problem.memory.T
    torch.testing.assert_close(delta, least_change_by_kkt(gram, problem.keys, problem.residual), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("d", "p"), SHAPES)
@pytest.mark.parametrize("memory", [False, True])
def test_one_key_makes_it_rome(make_problem, d: int, p: int, memory: bool) -> None:
    problem = make_problem(d, p, 1, 5)
    rome = ROME(preservation=3.0, memory=memory).solve(problem).delta(problem.weight)
    for ridge in (0.0, 0.1):  # which is for several keys that depend on one another
        emmet = EMMET(3.0, ridge, memory).solve(problem).delta(problem.weight)
        torch.testing.assert_close(emmet, rome, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [2, 10])
@pytest.mark.parametrize("ridge", [0.1, 5.0])
def test_a_ridge_makes_it_memit(make_problem, n: int, ridge: float) -> None:
    problem = make_problem(16, 48, n)
    emmet = EMMET(preservation=3.0, ridge=ridge).solve(problem).delta(problem.weight)
    memit = MEMIT(preservation=3.0 * ridge).solve(problem).delta(problem.weight)
    torch.testing.assert_close(emmet, memit, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("ridge", [0.1, 5.0])
@pytest.mark.parametrize("memory", [False, True])
def test_the_ridge_weighs_what_is_still_missing(make_problem, ridge: float, memory: bool) -> None:
    problem = make_problem(16, 48, 10, 6)
    gram = 3.0 * problem.covariance
    if memory:
        gram = gram + problem.memory @ problem.memory.T
    x = EMMET(3.0, ridge, memory).solve(problem).delta(problem.weight).requires_grad_()
    loss = torch.trace(x @ gram @ x.T) + (x @ problem.keys - problem.residual).square().sum() / ridge
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


def test_without_memory_and_ridge_the_scale_of_preservation_cancels(make_problem) -> None:
    problem = make_problem(n=10)
    one, many = (EMMET(preservation=x).solve(problem).delta(problem.weight) for x in (1.0, 1e4))
    torch.testing.assert_close(one, many, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", ["twice the same", "the same up to rounding", "a sum of others"])
def test_keys_that_depend_on_one_another_need_a_ridge(make_problem, kind: str) -> None:
    problem = make_problem(n=4)
    keys = problem.keys.clone()
    if kind == "a sum of others":
        keys[:, 3] = keys[:, 0] - 2 * keys[:, 1]
    else:
        keys[:, 3] = keys[:, 0] * (1 + (1e-7 if kind == "the same up to rounding" else 0))
    problem = make_problem(n=4, keys=keys)
    with pytest.raises(
        ValueError, match=r"The 4 keys of layer 'blocks.0' depend on one another .* Raise EMMET's `ridge`"
    ):
        EMMET().solve(problem)
    update = EMMET(ridge=0.1).solve(problem)
    assert update.norm < 100 * problem.residual.norm()


def test_opposite_wishes_for_one_key_are_met_half_way_by_a_ridge(make_problem) -> None:
    problem = make_problem(n=2)
    key, wishes = problem.keys[:, :1], problem.targets
    problem = make_problem(n=2, keys=key.expand(-1, 2).clone(), targets=wishes)
    after = problem.weight + EMMET(ridge=1e-6).solve(problem).delta(problem.weight)
    torch.testing.assert_close(after @ key, wishes.mean(1, keepdim=True), rtol=0, atol=1e-4)


def test_more_keys_than_dimensions_are_refused(make_problem) -> None:
    with pytest.raises(ValueError, match="depend on one another"):
        EMMET().solve(make_problem(16, 24, 30))


def test_a_zero_key_is_refused(make_problem) -> None:
    keys = make_problem(n=3).keys.clone()
    keys[:, 1] = 0
    with pytest.raises(ValueError, match=r"A key of layer 'blocks.0' is zero"):
        EMMET(ridge=0.1).solve(make_problem(n=3, keys=keys))


def test_a_covariance_of_too_few_tokens_is_refused(make_problem) -> None:
    keys = torch.randn(48, 20, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NotPositiveDefiniteError, match="more tokens than its 48 dimensions"):
        EMMET().solve(make_problem(n=3, covariance=keys @ keys.T / 20))


def test_rank_is_the_number_of_requests(make_problem) -> None:
    update = EMMET().solve(make_problem(16, 48, 10))
    assert update.left.shape == (16, 10)
    assert update.right.shape == (10, 48)
