import math
from typing import Any

import pytest
import torch
from helpers.sites import normal, orthogonal, site_of
from torch import Tensor

from lit_edit.editors.restraints import PRUNE
from lit_edit.model.edited_weight import EditedWeight


def layer(d: int = 16, p: int = 48, seed: int = 0, scale: float = 1.0) -> EditedWeight:
    """A weight that lies off its original by a few large and many small singular values."""
    original, n = scale * normal(d, p, seed=seed), min(d, p)
    values = torch.linspace(5.0, 0.01, n, dtype=torch.float64) ** 2
    total = (orthogonal(d, n, seed=seed + 1) * values) @ orthogonal(p, n, seed=seed + 2).T
    site = site_of(original + total, original=original)
    site.count(100)
    return site


def pruned(prune: PRUNE, site: EditedWeight) -> Tensor:
    """The sum of all updates at the end of a run."""
    update = prune.finish(site)
    if update is not None:
        site.write(update)
    return site.weight - site.original


def restrained(sigma: float, largest: float, form: str, alpha: float, beta: float) -> float:
    """Eq. 4 and 5, and the linear form of appendix C.3, with the logarithm to base α as it is written."""
    if sigma <= largest:
        return sigma
    if form == "log":
        return math.log(sigma, alpha) - math.log(largest, alpha) + largest
    return sigma / beta + (beta - 1) / beta * largest


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("d", "p"), [(12, 24), (16, 48), (24, 24), (30, 20)])
@pytest.mark.parametrize(
    ("form", "alpha", "beta"), [("log", 1.2, 2.0), ("log", math.e, 2.0), ("linear", 1.2, 2.0), ("linear", 9.0, 5.0)]
)
def test_large_singular_values_of_the_sum_are_cut_and_nothing_else(
    d: int, p: int, form: Any, alpha: float, beta: float, seed: int
) -> None:
    site = layer(d, p, seed)
    total, largest = site.weight - site.original, float(torch.linalg.svdvals(site.original)[0])
    found = pruned(PRUNE(alpha, form, beta), site)
    # Plain reference: all singular values, one by one, with the vectors of ΔW's two Gram matrices.
    values, right = torch.linalg.eigh(total.T @ total if p <= d else total @ total.T)
    expected = torch.zeros_like(total)
    for value, vector in zip(values.clamp(min=0).sqrt().tolist(), right.T, strict=True):
        share = torch.outer(total @ vector, vector) if p <= d else torch.outer(vector, vector @ total)
        expected += restrained(value, largest, form, alpha, beta) / value * share
    assert largest < values.max().sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert float((found - total).norm()) > 1


@pytest.mark.parametrize("form", ["log", "linear"])
def test_layers_that_need_no_restraint_are_left_alone(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PRUNE(form=form).finish(layer(scale=1000)) is None

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("lit_edit.editors.restraints.prune.singular_values", never)
    assert PRUNE(form=form).finish(site_of(normal(16, 48))) is None


@pytest.mark.parametrize("largest", [2.0, 7.0, 40.0])
@pytest.mark.parametrize(
    "prune", [PRUNE(1.2), PRUNE(1.5), PRUNE(math.e), PRUNE(form="linear"), PRUNE(form="linear", beta=9)]
)
def test_it_is_continuous_and_rises_and_never_enlarges(prune: PRUNE, largest: float) -> None:
    sigma = torch.linspace(0.01, 50 * largest, 5001, dtype=torch.float64)
    found = prune.restrained(sigma, torch.tensor(largest, dtype=torch.float64))
    assert (found.diff() > 0).all()
    assert (found <= sigma + 1e-12).all()
    torch.testing.assert_close(found[sigma <= largest], sigma[sigma <= largest], rtol=0, atol=0)
    nearby = torch.tensor([largest * (1 + 1e-9)], dtype=torch.float64)
    near = float(prune.restrained(nearby, torch.tensor(largest, dtype=torch.float64)))
    assert near == pytest.approx(largest, rel=1e-8)
    assert float(found[-1]) < 0.9 * float(sigma[-1])


@pytest.mark.parametrize("alpha", [1.2, 1.5, math.e])
@pytest.mark.parametrize("largest", [1.0, 2.5, 5.5, 7.0])
def test_the_logarithm_is_equation_5_wherever_that_restrains(alpha: float, largest: float) -> None:
    sigma = torch.linspace(0.1, 50, 300, dtype=torch.float64)
    found = PRUNE(alpha).restrained(sigma, torch.tensor(largest, dtype=torch.float64))
    expected = [restrained(s, largest, "log", alpha, 2.0) for s in sigma.tolist()]
    enlarged = any(e > s for e, s in zip(expected, sigma.tolist(), strict=True))
    assert enlarged == (largest * math.log(alpha) < 1)  # its slope at σ_max is 1 / (σ_max ln α)
    expected = [min(e, s) for e, s in zip(expected, sigma.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("every_n", "before", "after", "due"),
    [
        (None, 99, 100, False),
        (50, 49, 50, True),
        (50, 50, 51, False),
        (50, 48, 49, False),
        (50, 45, 55, True),  # crossed within the batch
        (50, 40, 50, True),
        (50, 50, 60, False),
        (50, 0, 120, True),
        (1, 7, 8, True),
    ],
)
def test_it_is_due_along_a_run_or_at_its_end(every_n: int | None, before: int, after: int, due: bool) -> None:
    prune, site = PRUNE(1.5, every_n=every_n), layer()
    assert (prune.total(site, before, after) is not None) == due
    assert (prune.finish(site) is not None) == (every_n is None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.0}, "alpha must be above 1 and finite, got 1.0"),
        ({"alpha": float("nan")}, "alpha must be above 1"),
        ({"form": "linear", "beta": 1.0}, "beta must be above 1"),
        ({"form": "square"}, "'log' or 'linear', not 'square'"),
        ({"every_n": 0}, "1 or more, not 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PRUNE(**settings)
