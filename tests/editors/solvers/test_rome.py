import pytest
import torch
from torch import Tensor

from lit_edit.algebra.linalg import NotPositiveDefiniteError
from lit_edit.editors.solvers import ROME

SHAPES = [(12, 24), (16, 48), (40, 96), (24, 24)]


def least_change_by_kkt(gram: Tensor, key: Tensor, residual: Tensor) -> Tensor:
    """Minimise tr(X G Xᵀ) subject to X k = r, from its optimality conditions: one bordered system for all rows."""
    p = len(gram)
    system = torch.zeros(p + 1, p + 1, dtype=torch.float64)
    system[:p, :p], system[:p, p:], system[p:, :p] = 2 * gram, key, key.T
    right = torch.cat([torch.zeros(p, len(residual), dtype=torch.float64), residual.T])
    return torch.linalg.solve(system, right)[:p].T


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("d", "p"), SHAPES)
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("covariance", [True, False])
def test_rome_hits_its_target_with_the_least_change(
    make_problem, d: int, p: int, seed: int, memory: bool, covariance: bool
) -> None:
    problem = make_problem(d, p, 1, 5, seed=seed)
    update = ROME(covariance=covariance, memory=memory, preservation=3.0).solve(problem)
    delta = update.delta(problem.weight)
    torch.testing.assert_close((problem.weight + delta) @ problem.keys, problem.targets, rtol=0, atol=1e-10)
    gram = 3 * (problem.covariance if covariance else torch.eye(p, dtype=torch.float64))
    if memory:
        gram = gram + problem.memory @ problem.memory.T
    torch.testing.assert_close(delta, least_change_by_kkt(gram, problem.keys, problem.residual), rtol=1e-8, atol=1e-10)


def test_without_memory_the_scale_of_preservation_cancels(make_problem) -> None:
    problem = make_problem()
    one, many = (ROME(preservation=x).solve(problem).delta(problem.weight) for x in (1.0, 1e4))
    torch.testing.assert_close(one, many, rtol=1e-9, atol=1e-12)


def test_rome_writes_one_fact_at_a_time(make_problem) -> None:
    with pytest.raises(ValueError, match="got 3 in a batch: set batch_size to 1, or use MEMIT"):
        ROME().solve(make_problem(n=3))


def test_rome_refuses_a_zero_key(make_problem) -> None:
    with pytest.raises(ValueError, match=r"key of layer 'blocks.0' is zero"):
        ROME().solve(make_problem(keys=torch.zeros(48, 1)))


def test_rome_refuses_a_covariance_of_too_few_tokens(make_problem) -> None:
    keys = torch.randn(48, 20, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NotPositiveDefiniteError, match="more tokens than its 48 dimensions"):
        ROME().solve(make_problem(covariance=keys @ keys.T / 20))


def mixed(make_problem, d: int = 16, p: int = 48, **changes):
    """A problem whose value key is near its key but not the same."""
    value_keys = make_problem(d, p).keys + 0.3 * make_problem(d, p, seed=9).keys
    return make_problem(d, p, 1, 5, **{"value_keys": value_keys, **changes})


@pytest.mark.parametrize(("d", "p"), SHAPES)
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("covariance", [True, False])
def test_two_keys_as_in_the_released_code(make_problem, d: int, p: int, memory: bool, covariance: bool) -> None:
    problem = mixed(make_problem, d, p)
    update = ROME(covariance=covariance, memory=memory, preservation=3.0).solve(problem)
    mean, bare, target = problem.keys[:, 0], problem.value_keys[:, 0], problem.targets[:, 0]
    gram = 3 * (problem.covariance if covariance else torch.eye(p, dtype=torch.float64))
    if memory:
        for key in problem.memory.T:
            gram = gram + torch.outer(key, key)
    u = torch.linalg.inv(gram) @ mean
    expected = torch.outer(target - problem.weight @ bare, u) / torch.dot(bare, u)
    torch.testing.assert_close(update.delta(problem.weight), expected, rtol=1e-8, atol=1e-10)
    # It is the bare prompt's output that is written exactly, not the mean key's.
    after = problem.weight + update.delta(problem.weight)
    torch.testing.assert_close(after @ bare, target, rtol=0, atol=1e-10)
    assert float((after @ mean - target).norm()) > 1e-2


def test_equal_keys_make_both_forms_one(make_problem) -> None:
    problem = make_problem()
    both = make_problem(value_keys=problem.keys)
    one, two = (ROME().solve(x).delta(problem.weight) for x in (problem, both))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_keys_without_anything_in_common_are_refused(make_problem) -> None:
    key, other = torch.eye(48)[:, :1], torch.eye(48)[:, 1:2]
    apart = make_problem(keys=key, value_keys=other, covariance=torch.diag(torch.arange(1.0, 49.0)))
    with pytest.raises(
        ValueError, match=r"two keys of layer 'blocks.0' have nothing in common.*leave `value_keys` out"
    ):
        ROME().solve(apart)
