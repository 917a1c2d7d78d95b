import pytest
import torch
from helpers.sites import random_case

from lit_edit.editors.solvers import EMMET, MEMIT, Solver


@pytest.mark.parametrize(("d", "p"), [(12, 24), (40, 96), (24, 24)])
@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("preservation", [0.5, 100.0])
def test_memit_is_the_least_squares_solution(d: int, p: int, n: int, memory: bool, preservation: float) -> None:
    case = random_case(d, p, n, 6)
    remembered = case.memory if memory else case.memory[:, :0]
    delta = case.delta(MEMIT(preservation, memory))

    x = delta.clone().requires_grad_()
    loss = preservation * torch.trace(x @ case.covariance @ x.T)
    loss = loss + (x @ remembered).square().sum() + (x @ case.keys - case.residual).square().sum()
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)


def test_little_preservation_reaches_the_targets_and_much_leaves_the_weight() -> None:
    case = random_case(n=10)
    torch.testing.assert_close((case.weight + case.delta(MEMIT(1e-9))) @ case.keys, case.targets, rtol=0, atol=1e-5)
    assert case.solve(MEMIT(1e9)).norm < 1e-4


@pytest.mark.parametrize("solver", [MEMIT(), EMMET()])
def test_rank_is_the_number_of_requests(solver: Solver) -> None:
    state = random_case(n=10).solve(solver).state_dict()
    assert (state["left"].shape, state["right"].shape) == ((16, 10), (10, 48))
