import pytest
import torch
from torch import Tensor

import lit_edit.editors.solvers.kept as module
from lit_edit.editors.solvers import AlphaEdit

SHAPES = [(12, 24), (16, 48), (40, 96), (24, 24)]


def keys_of_rank(p: int, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(p, rank, generator=generator, dtype=torch.float64)).Q
    return basis @ torch.randn(rank, 4 * p, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("d", "p"), SHAPES)
@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("m", [0, 6, 200])  # more remembered keys than dimensions take the other branch
def test_preserved_outputs_stay_and_the_papers_formula_holds(
    make_problem, d: int, p: int, n: int, m: int, seed: int
) -> None:
    preserved = keys_of_rank(p, p // 2, seed)
    problem = make_problem(d, p, n, m, seed=seed, covariance=preserved @ preserved.T / preserved.shape[1])
    ridge = 0.3
    delta = AlphaEdit(threshold=1e-9, ridge=ridge).solve(problem).delta(problem.weight)
    torch.testing.assert_close(delta @ preserved, torch.zeros(d, 4 * p, dtype=torch.float64), rtol=0, atol=1e-10)
    assert float(delta.norm()) > 1e-3

    # Independent: P from the pseudo-inverse, and the unsymmetric system just as it is printed.
    projector = torch.eye(p, dtype=torch.float64) - preserved @ torch.linalg.pinv(preserved)
    gram = problem.keys @ problem.keys.T
    if m:
        gram = gram + problem.memory @ problem.memory.T
    system = projector @ gram + ridge * torch.eye(p, dtype=torch.float64)
    expected = torch.linalg.solve(system, projector @ problem.keys @ problem.residual.T).T
    torch.testing.assert_close(delta, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("n", [1, 10, 60])
def test_with_the_whole_space_free_it_is_ridge_regression(make_problem, n: int) -> None:
    problem = make_problem(16, 48, n, 5)
    delta = AlphaEdit(threshold=1e9, ridge=2.0, memory=False).solve(problem).delta(problem.weight)
    stacked = torch.cat([problem.keys, 2.0**0.5 * torch.eye(48, dtype=torch.float64)], dim=1)
    wanted = torch.cat([problem.residual, torch.zeros(16, 48, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(stacked.T, wanted.T, driver="gelsd").solution.T
    torch.testing.assert_close(delta, expected, rtol=1e-9, atol=1e-11)


def test_no_null_space_says_what_to_do(make_problem) -> None:
    problem = make_problem(covariance=torch.diag(torch.linspace(0.5, 4.0, 48)))
    with pytest.raises(
        ValueError, match=r"layer 'blocks.0': the smallest of 48 .* is 0.5, the threshold 0.02.*`energy`"
    ):
        AlphaEdit().solve(problem)
    with pytest.raises(ValueError, match=r"already 0.0046 of their sum. Raise `energy`, now 0.001"):
        AlphaEdit(threshold=None, energy=1e-3).solve(problem)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    real = module.null_space_projector

    def counting(*args, **kwargs):
        found.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "null_space_projector", counting)
    return found


def test_projector_is_computed_once_per_layer(make_problem, calls: list[int]) -> None:
    solver, covariance = AlphaEdit(threshold=None, energy=0.2), make_problem().covariance
    for seed in range(3):
        for layer in ("a", "b"):
            solver.solve(make_problem(seed=seed, covariance=covariance, layer=layer))
    assert len(calls) == 2


def test_projector_does_not_go_stale(make_problem, calls: list[int]) -> None:
    solver = AlphaEdit(threshold=None, energy=0.2)
    first, second = make_problem(seed=0), make_problem(seed=1)  # the same layer name, another covariance
    for problem in (first, second, first):
        fresh = AlphaEdit(threshold=None, energy=0.2).projector(problem)
        torch.testing.assert_close(solver.projector(problem), fresh, rtol=0, atol=0)
    first.covariance.copy_(second.covariance)
    torch.testing.assert_close(solver.projector(first), solver.projector(second), rtol=0, atol=0)


def test_covariance_made_in_inference_mode(make_problem, calls: list[int]) -> None:
    with torch.inference_mode():
        covariance = make_problem().covariance.clone()
    solver = AlphaEdit(threshold=None, energy=0.2)
    for _ in range(2):
        solver.solve(make_problem(covariance=covariance))
    assert len(calls) == 1
