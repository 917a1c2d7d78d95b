import pytest
import torch

from lit_edit.editors.solvers import MEMIT

SHAPES = [(12, 24), (16, 48), (40, 96), (24, 24)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("d", "p"), SHAPES)
@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("preservation", [0.5, 100.0])
def test_memit_is_the_least_squares_solution(
    make_problem, d: int, p: int, n: int, seed: int, memory: bool, preservation: float
) -> None:
    problem = make_problem(d, p, n, 6, seed=seed)
    remembered = problem.memory if memory else problem.memory[:, :0]
    delta = MEMIT(preservation, memory).solve(problem).delta(problem.weight)

    x = delta.clone().requires_grad_()
    loss = preservation * torch.trace(x @ problem.covariance @ x.T)
    loss = loss + (x @ remembered).square().sum() + (x @ problem.keys - problem.residual).square().sum()
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)

    # The same as one stacked system of linear equations, which never forms a Gram matrix of keys.
    root = torch.linalg.cholesky(problem.covariance) * preservation**0.5
    stacked = torch.cat([root, remembered, problem.keys], dim=1)
    wanted = torch.cat([torch.zeros(d, p + remembered.shape[1], dtype=torch.float64), problem.residual], dim=1)
    expected = torch.linalg.lstsq(stacked.T, wanted.T, driver="gelsd").solution.T
    torch.testing.assert_close(delta, expected, rtol=1e-7, atol=1e-9)


def test_little_preservation_reaches_the_targets_and_much_leaves_the_weight(make_problem) -> None:
    problem = make_problem(16, 48, 10)
    eager, shy = (MEMIT(x).solve(problem) for x in (1e-9, 1e9))
    torch.testing.assert_close(
        (problem.weight + eager.delta(problem.weight)) @ problem.keys, problem.targets, rtol=0, atol=1e-5
    )
    assert shy.norm < 1e-4


def test_rank_is_the_number_of_requests(make_problem) -> None:
    update = MEMIT().solve(make_problem(16, 48, 10))
    assert update.left.shape == (16, 10)
    assert update.right.shape == (10, 48)
