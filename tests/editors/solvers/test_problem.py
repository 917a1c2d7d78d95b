import math

import pytest
import torch

from lit_edit.editors.solvers import EMMET, MEMIT, MOSE, ROME, AlphaEdit, MOSEKey, Problem, Solver, preserved_gram


def test_residual_and_storage(make_problem) -> None:
    problem = make_problem(n=3)
    torch.testing.assert_close(problem.residual, problem.targets - problem.weight @ problem.keys)
    single = Problem(torch.ones(2, 3), torch.ones(3, 1), torch.ones(2, 1), covariance := torch.eye(3))
    assert single.keys.dtype == single.targets.dtype == single.outputs(single.keys).dtype == torch.float64
    assert single.weight.dtype == torch.float32  # as it is stored, not copied
    assert single.covariance is covariance


def test_problem_is_detached() -> None:
    problem = Problem(torch.ones(2, 3, requires_grad=True), torch.ones(3, 1), torch.ones(2, 1, requires_grad=True))
    assert not problem.residual.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"keys": torch.ones(5, 1)},
            r"'h.3': keys must have shape \(3, 1\) .* weight of shape \(2, 3\).* got \(5, 1\)",
        ),
        ({"keys": torch.ones(3)}, r"'h.3': keys must be a matrix, got shape \(3,\)"),
        ({"keys": torch.ones(3, 0), "targets": torch.ones(2, 0)}, "'h.3': there are no keys to edit"),
        ({"targets": torch.ones(2, 2)}, r"targets must have shape \(2, 1\) .* and 1 keys, got \(2, 2\)"),
        ({"covariance": torch.eye(2)}, r"covariance must have shape \(3, 3\) .* got \(2, 2\)"),
        ({"memory": torch.ones(2, 4)}, r"memory must have shape \(3, 4\) .* got \(2, 4\)"),
        ({"keys": torch.full((3, 1), math.nan)}, "keys of shape .* not finite"),
        ({"targets": torch.full((2, 1), math.inf)}, "targets of shape .* not finite"),
        ({"covariance": torch.full((3, 3), math.nan)}, "covariance of shape .* not finite"),
    ],
)
def test_bad_problems_are_refused(changes, message: str) -> None:
    good = {"weight": torch.ones(2, 3), "keys": torch.ones(3, 1), "targets": torch.ones(2, 1), "layer": "h.3"}
    with pytest.raises(ValueError, match=message):
        Problem(**{**good, **changes})


def test_preserved_gram(make_problem) -> None:
    problem = make_problem(m=5)
    expected = 7 * problem.covariance + sum(torch.outer(k, k) for k in problem.memory.T)
    before = problem.covariance.clone()
    torch.testing.assert_close(preserved_gram(problem.covariance, problem.memory, 7.0), expected)
    torch.testing.assert_close(preserved_gram(problem.covariance, problem.memory[:, :0], 7.0), 7 * before)
    torch.testing.assert_close(problem.covariance, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "solver",
    [MOSE(), MOSEKey(), ROME(memory=True), EMMET(memory=True), MEMIT(1.0, memory=True), AlphaEdit(None, energy=0.02)],
    ids=lambda solver: type(solver).__name__,
)
def test_keys_of_long_ago_that_are_not_finite_are_refused_when_solving(solver: Solver) -> None:
    g = torch.Generator().manual_seed(0)
    memory = torch.randn(120, 100, generator=g)
    weight, key, target = (torch.randn(shape, generator=g) for shape in ((80, 120), (120, 1), (80, 1)))
    memory[3, -1] = float("nan")
    with pytest.raises(ValueError, match=r"memory of shape .* not finite"):
        Problem(weight, key, target, torch.eye(120), memory)
    memory[3, -1], memory[3, 0] = 1.0, float("nan")
    with pytest.raises(ValueError, match=r"not finite|Nothing is preserved"):
        solver.solve(Problem(weight, key, target, torch.eye(120), memory))
