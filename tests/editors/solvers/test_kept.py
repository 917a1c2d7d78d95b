"""Kept factors give what the dense systems give, whatever has been added since."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lit_edit.algebra.linalg import NotPositiveDefiniteError, solve_spd
from lit_edit.editors.solvers import EMMET, MEMIT, ROME, AlphaEdit
from lit_edit.editors.solvers.kept import KeptGram


@pytest.fixture
def parts(make_problem):
    problem = make_problem(16, 48, 3, 9)
    return problem.covariance.double(), problem.memory, problem.keys


def test_systems_are_solved_as_with_the_dense_matrix(parts) -> None:
    covariance, memory, keys = parts
    kept = KeptGram.of(covariance, 2.5, keys)
    torch.testing.assert_close(kept.solve(keys), solve_spd(2.5 * covariance, keys), rtol=1e-9, atol=1e-11)
    for m in (1, 4, 9):
        kept = kept.with_all(memory[:, :m])
        dense = 2.5 * covariance + memory[:, :m] @ memory[:, :m].T
        torch.testing.assert_close(kept.solve(keys), solve_spd(dense, keys), rtol=1e-8, atol=1e-10)
        assert kept.with_all(memory[:, :m]) is kept


def test_keys_that_come_together_count_as_those_that_come_one_by_one(parts) -> None:
    covariance, memory, keys = parts
    at_once = KeptGram.of(covariance, 1.0, keys).with_all(memory)
    later = KeptGram.of(covariance, 1.0, keys)
    for m in range(1, 10):
        later = later.with_all(memory[:, :m])
    torch.testing.assert_close(later.solve(keys), at_once.solve(keys), rtol=0, atol=0)


@pytest.fixture
def folding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_edit.editors.solvers.kept.FOLD_AT", 12)


def test_remembered_keys_go_in_and_the_systems_stay_the_same(make_problem, folding) -> None:
    problem = make_problem(16, 48, 2, 40)
    covariance, memory, keys = problem.covariance.double(), problem.memory, problem.keys
    kept = KeptGram.of(covariance, 2.5, keys)
    for m in (11, 12, 30, 40):
        kept = kept.with_all(memory[:, :m])
        assert kept.fresh.shape[1] == m % 12
        dense = 2.5 * covariance + memory[:, :m] @ memory[:, :m].T
        torch.testing.assert_close(kept.solve(keys), solve_spd(dense, keys), rtol=1e-8, atol=1e-10)
    at_once = KeptGram.of(covariance, 2.5, keys).with_all(memory)
    torch.testing.assert_close(at_once.solve(keys), kept.solve(keys), rtol=0, atol=0)


def test_alphaedit_with_remembered_keys_folded_in(make_problem, folding) -> None:
    solver = AlphaEdit(threshold=None, energy=0.2, ridge=0.3)
    whole = make_problem(16, 48, 2, 40)
    for m in (5, 14, 40):
        problem = replace(whole, memory=whole.memory[:, :m])
        p = solver.projector(problem)
        seen = torch.cat([problem.keys, problem.memory], dim=1)
        system = p @ seen @ seen.T @ p + 0.3 * torch.eye(48, dtype=torch.float64)
        expected = (torch.linalg.solve(system, p @ problem.keys) @ problem.residual.T).T
        torch.testing.assert_close(solver.solve(problem).delta(problem.weight), expected, rtol=1e-8, atol=1e-10)
    # Fewer keys than before: a run that was taken back. The projector stays.
    shorter = replace(whole, memory=whole.memory[:, :3])
    kept = solver._kept[whole.layer].projector
    fresh = AlphaEdit(threshold=None, energy=0.2, ridge=0.3).solve(shorter).delta(whole.weight)
    torch.testing.assert_close(solver.solve(shorter).delta(whole.weight), fresh, rtol=0, atol=0)
    assert solver._kept[whole.layer].projector is kept
    solver.ridge = 3.0
    fresh = AlphaEdit(threshold=None, energy=0.2, ridge=3.0).solve(whole).delta(whole.weight)
    torch.testing.assert_close(solver.solve(whole).delta(whole.weight), fresh, rtol=0, atol=0)
    solver.energy = 0.05
    fresh = AlphaEdit(threshold=None, energy=0.05, ridge=3.0).solve(whole).delta(whole.weight)
    torch.testing.assert_close(solver.solve(whole).delta(whole.weight), fresh, rtol=0, atol=0)


def test_it_belongs_to_one_covariance_and_one_past(parts) -> None:
    covariance, memory, keys = parts
    kept = KeptGram.of(covariance, 1.0, keys).with_all(memory[:, :4])
    assert kept.begins(memory)
    assert not kept.begins(memory[:, :3])  # a run that was taken back
    assert not kept.begins(memory.flip(1))
    assert kept.is_of(covariance, keys.device)
    assert not kept.is_of(covariance.clone(), keys.device)
    assert not kept.is_of(covariance, torch.device("meta"))
    covariance[0, 0] += 1
    assert not kept.is_of(covariance, keys.device)


def test_a_singular_covariance_is_refused(parts) -> None:
    covariance, _, keys = parts
    with pytest.raises(NotPositiveDefiniteError):
        KeptGram.of(keys @ keys.T, 1.0, keys)
    assert covariance.shape == (48, 48)


@pytest.mark.parametrize(
    "make", [lambda: ROME(memory=True), lambda: MEMIT(5.0, memory=True), lambda: EMMET(memory=True)]
)
def test_a_solver_asked_for_other_problems_in_between_answers_the_same(make_problem, make) -> None:
    solver, problem, other = make(), make_problem(n=1, m=6, seed=1), make_problem(n=1, m=3, seed=2)
    first = solver.solve(problem).delta(problem.weight)
    solver.solve(other)
    torch.testing.assert_close(solver.solve(problem).delta(problem.weight), first, rtol=0, atol=0)
    torch.testing.assert_close(make().solve(problem).delta(problem.weight), first, rtol=0, atol=0)
    factorised = solver._grams[problem.layer].factor
    solver.solve(problem)
    assert solver._grams[problem.layer].factor is factorised
