"""ROME and EMMET: facts written exactly, with the least change to everything else."""

from __future__ import annotations

import pytest
import torch
from helpers.sites import Case, least_change, random_case

from lit_edit.editors.solvers import EMMET, MEMIT, ROME, Solver

SHAPES = [(12, 24), (40, 96), (24, 24)]
each_shape = pytest.mark.parametrize(("d", "p"), SHAPES)
with_memory = pytest.mark.parametrize("memory", [False, True])


def gram_of(case: Case, memory: bool, covariance: bool = True) -> torch.Tensor:
    gram = 3 * (case.covariance if covariance else torch.eye(len(case.keys), dtype=torch.float64))
    return gram + case.memory @ case.memory.T if memory else gram


@pytest.mark.parametrize("seed", range(2))
@each_shape
@with_memory
@pytest.mark.parametrize("kind", ["rome", "rome without covariance", "emmet", "emmet of ten"])
def test_every_fact_is_written_exactly_with_the_least_change(
    d: int, p: int, seed: int, memory: bool, kind: str
) -> None:
    case = random_case(d, p, 10 if kind == "emmet of ten" else 1, 5, seed=seed)
    covariance = kind != "rome without covariance"
    solver: Solver = EMMET(3.0, memory=memory) if "emmet" in kind else ROME(covariance, memory, preservation=3.0)
    delta = case.delta(solver)
    torch.testing.assert_close((case.weight + delta) @ case.keys, case.targets, rtol=0, atol=1e-9)
    expected = least_change(gram_of(case, memory, covariance), case.keys, case.residual)
    torch.testing.assert_close(delta, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solvers", [(ROME(), ROME(preservation=1e4)), (EMMET(), EMMET(preservation=1e4))])
def test_without_memory_and_ridge_the_scale_of_preservation_cancels(solvers: tuple[Solver, Solver]) -> None:
    case = random_case(n=1 if isinstance(solvers[0], ROME) else 10)
    torch.testing.assert_close(case.delta(solvers[0]), case.delta(solvers[1]), rtol=1e-8, atol=1e-11)


# ROME


def test_rome_writes_one_fact_at_a_time() -> None:
    with pytest.raises(ValueError, match="got 3 in a batch: set batch_size to 1, or use MEMIT"):
        random_case(n=3).solve(ROME())


@each_shape
@with_memory
@pytest.mark.parametrize("covariance", [True, False])
def test_two_keys_as_in_the_released_code(d: int, p: int, memory: bool, covariance: bool) -> None:
    near = random_case(d, p).keys + 0.3 * random_case(d, p, seed=9).keys
    case = random_case(d, p, 1, 5, value_keys=near)
    mean, bare, target = case.keys[:, 0], near[:, 0], case.targets[:, 0]
    u = torch.linalg.inv(gram_of(case, memory, covariance)) @ mean
    expected = torch.outer(target - case.weight @ bare, u) / torch.dot(bare, u)
    delta = case.delta(ROME(covariance=covariance, memory=memory, preservation=3.0))
    torch.testing.assert_close(delta, expected, rtol=1e-8, atol=1e-10)
    # It is the bare prompt's output that is written exactly, not the mean key's.
    torch.testing.assert_close((case.weight + delta) @ bare, target, rtol=0, atol=1e-10)
    assert float(((case.weight + delta) @ mean - target).norm()) > 1e-2


def test_equal_keys_make_both_forms_one_and_keys_without_anything_in_common_are_refused() -> None:
    case = random_case()
    same = case.fresh(value_keys=case.keys)
    torch.testing.assert_close(case.delta(ROME()), same.delta(ROME()), rtol=0, atol=0)
    key, other = torch.eye(48)[:, :1], torch.eye(48)[:, 1:2]
    apart = case.fresh(keys=key, value_keys=other, covariance=torch.diag(torch.arange(1.0, 49.0)))
    with pytest.raises(ValueError, match=r"two keys of layer 'h.3' have nothing in common.*leave `value_keys` out"):
        apart.solve(ROME())


# EMMET


@each_shape
@with_memory
def test_one_key_makes_it_rome(d: int, p: int, memory: bool) -> None:
    case = random_case(d, p, 1, 5)
    rome = case.delta(ROME(preservation=3.0, memory=memory))
    for ridge in (0.0, 0.1):  # which is for several keys that depend on one another
        torch.testing.assert_close(case.delta(EMMET(3.0, ridge, memory)), rome, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [2, 10])
@pytest.mark.parametrize("ridge", [0.1, 5.0])
def test_a_ridge_makes_it_memit(n: int, ridge: float) -> None:
    case = random_case(n=n)
    memit = case.delta(MEMIT(preservation=3.0 * ridge))
    torch.testing.assert_close(case.delta(EMMET(3.0, ridge)), memit, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("ridge", [0.1, 5.0])
@with_memory
def test_the_ridge_weighs_what_is_still_missing(ridge: float, memory: bool) -> None:
    case = random_case(16, 48, 10, 6)
    x, gram = case.delta(EMMET(3.0, ridge, memory)).requires_grad_(), gram_of(case, memory)
    loss = torch.trace(x @ gram @ x.T) + (x @ case.keys - case.residual).square().sum() / ridge
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["twice the same", "the same up to rounding", "a sum of others", "too many"])
def test_keys_that_depend_on_one_another_need_a_ridge(kind: str) -> None:
    case = random_case(16, 24, 30) if kind == "too many" else random_case(n=4)
    if kind == "a sum of others":
        case.keys[:, 3] = case.keys[:, 0] - 2 * case.keys[:, 1]
    elif kind != "too many":
        case.keys[:, 3] = case.keys[:, 0] * (1 + (1e-7 if kind == "the same up to rounding" else 0))
    with pytest.raises(ValueError, match=r"keys of layer 'h.3' depend on one another .* Raise EMMET's `ridge`"):
        case.solve(EMMET())
    assert case.solve(EMMET(ridge=0.1)).norm < 100 * case.residual.norm()


def test_opposite_wishes_for_one_key_are_met_half_way_by_a_ridge() -> None:
    case = random_case(n=2)
    key = case.keys[:, :1]
    case = case.fresh(keys=key.expand(-1, 2).clone())
    after = case.weight + case.delta(EMMET(ridge=1e-6))
    torch.testing.assert_close(after @ key, case.targets.mean(1, keepdim=True), rtol=0, atol=1e-4)
