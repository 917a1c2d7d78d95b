"""Kept factors give what the dense systems give, whatever has been added since."""

from __future__ import annotations

import pytest
import torch
from helpers.sites import random_case, site_of

from lit_edit.algebra.linalg import NotPositiveDefiniteError, solve_spd
from lit_edit.editors.solvers import AlphaEdit
from lit_edit.editors.solvers.preserved import PreservedGram


@pytest.fixture(autouse=True)
def fold_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_edit.editors.solvers.preserved.FOLD_AT", 12)


def test_remembered_keys_go_in_and_the_systems_stay_the_same() -> None:
    case = random_case(n=2, m=40)
    site, memory, keys = case.site, case.memory, case.keys
    kept = PreservedGram.of(case.covariance, 2.5, site)
    for m in (0, 1, 11, 12, 30, 40):
        kept = kept.with_all(memory[:, :m], site)
        assert kept.fresh.shape[1] == m % 12
        dense = 2.5 * case.covariance + memory[:, :m] @ memory[:, :m].T
        torch.testing.assert_close(kept.solve(keys), solve_spd(dense, keys), rtol=1e-8, atol=1e-10)
    # Keys that come together count as those that come one by one.
    at_once = PreservedGram.of(case.covariance, 2.5, site).with_all(memory, site)
    torch.testing.assert_close(at_once.solve(keys), kept.solve(keys), rtol=0, atol=0)
    assert kept.fits(site, memory)
    assert not kept.fits(site, memory[:, :39])  # of a solver that counts fewer
    site.forget([1])
    assert not kept.fits(site, memory)


def test_alphaedit_with_remembered_keys_folded_in() -> None:
    solver, case = AlphaEdit(threshold=None, energy=0.2, ridge=0.3), random_case(n=2, m=5)
    p = solver.projector(case.site)
    for more in (0, 9, 26):
        past = random_case(m=more, seed=more).memory
        case.site.remember(range(100, 100 + more), past, torch.zeros(16, more))
        seen = torch.cat([case.keys, case.memory], dim=1)
        system = p @ seen @ seen.T @ p + 0.3 * torch.eye(48, dtype=torch.float64)
        expected = (torch.linalg.solve(system, p @ case.keys) @ case.residual.T).T
        torch.testing.assert_close(case.delta(solver), expected, rtol=1e-8, atol=1e-10)


def test_a_singular_covariance_is_refused() -> None:
    keys = random_case(n=3).keys
    with pytest.raises(NotPositiveDefiniteError):
        PreservedGram.of(keys @ keys.T, 1.0, site_of(torch.ones(2, 48)))
