import pytest
import torch
from helpers.sites import case_of, normal, orthogonal, random_case

import lit_edit.editors.solvers.alphaedit as module
from lit_edit.editors.solvers import AlphaEdit


@pytest.mark.parametrize(("d", "p"), [(12, 24), (40, 96), (24, 24)])
@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("m", [0, 6, 200])
def test_preserved_outputs_stay_and_the_papers_formula_holds(d: int, p: int, n: int, m: int) -> None:
    preserved = orthogonal(p, p // 2) @ normal(p // 2, 4 * p, seed=1)
    case = random_case(d, p, n, m, covariance=preserved @ preserved.T / preserved.shape[1])
    ridge = 0.3
    delta = case.delta(AlphaEdit(threshold=1e-9, ridge=ridge))
    torch.testing.assert_close(delta @ preserved, torch.zeros(d, 4 * p, dtype=torch.float64), rtol=0, atol=1e-10)
    assert float(delta.norm()) > 1e-3

    # Independent: P from the pseudo-inverse, and the unsymmetric system just as it is printed.
    projector = torch.eye(p, dtype=torch.float64) - preserved @ torch.linalg.pinv(preserved)
    gram = case.keys @ case.keys.T + case.memory @ case.memory.T
    system = projector @ gram + ridge * torch.eye(p, dtype=torch.float64)
    expected = torch.linalg.solve(system, projector @ case.keys @ case.residual.T).T
    torch.testing.assert_close(delta, expected, rtol=1e-8, atol=1e-10)


def test_a_ridge_in_units_of_energy_is_the_same_at_every_scale_of_keys() -> None:
    """With keys ten times as long the update is a tenth, and does the same to them."""
    one = random_case(seed=3)
    ten = case_of(one.weight, one.keys * 10, one.targets + 9 * one.weight @ one.keys, one.covariance * 100)
    by_energy = AlphaEdit(threshold=None, energy=0.3, ridge=1e-2, ridge_unit="energy")
    torch.testing.assert_close(ten.delta(by_energy) * 10, one.delta(by_energy), rtol=1e-9, atol=1e-12)
    absolute = AlphaEdit(threshold=None, energy=0.3, ridge=1e-2 * float(one.covariance.trace()))
    torch.testing.assert_close(one.delta(by_energy), one.delta(absolute), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="'absolute' or 'energy', not 'share'"):
        AlphaEdit(ridge_unit="share")  # type: ignore[arg-type]


def test_no_null_space_says_what_to_do() -> None:
    case = random_case(covariance=torch.diag(torch.linspace(0.5, 4.0, 48)))
    with pytest.raises(ValueError, match=r"layer 'h.3': the smallest of 48 .* is 0.5, the threshold 0.02.*`energy`"):
        case.solve(AlphaEdit())
    with pytest.raises(ValueError, match=r"already 0.0046 of their sum. Raise `energy`, now 0.001"):
        AlphaEdit(threshold=None, energy=1e-3).check(case.site)


def test_the_projector_is_computed_once_for_a_layer_and_its_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], module.null_space_projector
    monkeypatch.setattr(module, "null_space_projector", lambda *args, **more: calls.append(1) or real(*args, **more))
    solver, cases = AlphaEdit(threshold=None, energy=0.2), [random_case(seed=seed) for seed in (0, 1)]
    for case in cases:
        solver.check(case.site)
        for i in range(3):
            case.then(i).write(solver)
        case.site.forget([1, 2])
        case.then(9).write(solver)
    assert len(calls) == 2
    cases[0].site.covariance = cases[1].covariance
    torch.testing.assert_close(solver.projector(cases[0].site), solver.projector(cases[1].site), rtol=0, atol=0)
    solver.energy = 0.05
    other = AlphaEdit(threshold=None, energy=0.05).projector(cases[1].fresh().site)
    torch.testing.assert_close(solver.projector(cases[0].site), other, rtol=0, atol=0)
