import pytest
import torch
from torch import Tensor

from lit_edit.algebra.linalg import orthogonality_error, spectrum_summary
from lit_edit.editors.solvers import MOSE, Problem
from lit_edit.editors.solvers.mose_key import MOSEKey, least_changed_keys, matched_keys

WIDE = [(12, 24), (16, 48), (40, 96)]
SHAPES = [*WIDE, (24, 24), (30, 20)]


def reachable(make_problem, d: int = 16, p: int = 48, n: int = 1, m: int = 0, seed: int = 0) -> Problem:
    """A problem whose targets the weight has for keys of the right length: outputs of other keys, a little shorter."""
    problem = make_problem(d, p, n, m, seed=seed)
    others = torch.randn(p, n, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    others = 0.8 * others / others.norm(dim=0) * problem.keys.norm(dim=0)
    return make_problem(d, p, n, m, seed=seed, targets=problem.weight @ others)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("d", "p"), WIDE)
@pytest.mark.parametrize("n", [1, 10])
def test_the_key_sought_has_the_same_length_and_gives_the_target(
    make_problem, d: int, p: int, n: int, seed: int
) -> None:
    problem = reachable(make_problem, d, p, n, seed=seed)
    found = matched_keys(problem.weight, problem.keys, problem.targets)
    torch.testing.assert_close(problem.weight @ found, problem.targets, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.norm(dim=0), problem.keys.norm(dim=0), rtol=1e-12, atol=0)
    # Of all such keys it is the nearest to k: on the sphere that means the largest product with it.
    free = torch.linalg.svd(problem.weight).Vh[d:].T
    row = found - free @ (free.T @ found)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(50):
        other = free @ torch.randn(p - d, n, generator=generator, dtype=torch.float64)
        other = row + other / other.norm(dim=0) * (found - row).norm(dim=0)
        torch.testing.assert_close(problem.weight @ other, problem.targets, rtol=0, atol=1e-11)
        assert ((found * problem.keys).sum(0) >= (other * problem.keys).sum(0) - 1e-12).all()


@pytest.mark.parametrize("n", [1, 10])
def test_a_target_out_of_reach_is_met_in_direction(make_problem, n: int) -> None:
    problem = reachable(make_problem, n=n)
    far = 50 * problem.targets
    far[:, 0] = problem.targets[:, 0]
    found = matched_keys(problem.weight, problem.keys, far)
    torch.testing.assert_close(found.norm(dim=0), problem.keys.norm(dim=0), rtol=1e-12, atol=0)
    output = problem.weight @ found
    torch.testing.assert_close(torch.cosine_similarity(output, far, dim=0), torch.ones(n).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(output[:, 0], far[:, 0], rtol=0, atol=1e-11)  # the others do not disturb it
    assert (output.norm(dim=0)[1:] < far.norm(dim=0)[1:]).all()
    # The sphere has nothing nearer to W⁺v.
    row = torch.linalg.lstsq(problem.weight, far, driver="gelsd").solution
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-1, 1.0):
        other = found + size * torch.randn(found.shape, generator=generator, dtype=torch.float64)
        other = other / other.norm(dim=0) * found.norm(dim=0)
        assert ((found - row).norm(dim=0)[1:] <= (other - row).norm(dim=0)[1:]).all()


@pytest.mark.parametrize("shrink", [0.1, 0.9, 3.0])
def test_without_a_null_space_the_direction_is_met(make_problem, shrink: float) -> None:
    problem = reachable(make_problem, 24, 24, 5)
    found = matched_keys(problem.weight, problem.keys, shrink * problem.targets)
    torch.testing.assert_close(found.norm(dim=0), problem.keys.norm(dim=0), rtol=1e-12, atol=0)
    cosine = torch.cosine_similarity(problem.weight @ found, problem.targets, dim=0)
    torch.testing.assert_close(cosine, torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-8)


def test_a_key_without_a_null_space_part_is_lengthened_where_it_stands(make_problem) -> None:
    problem = reachable(make_problem)
    key = problem.weight.T @ torch.ones(16, 1, dtype=torch.float64)
    target = 0.3 * problem.weight @ key
    torch.testing.assert_close(matched_keys(problem.weight, key, target), key, rtol=1e-10, atol=1e-12)
    # Nothing to point at either: the key is left alone.
    silent = matched_keys(problem.weight, key, torch.zeros_like(target))
    torch.testing.assert_close(silent, key, rtol=0, atol=0)


def test_present_outputs_ask_for_no_rotation(make_problem) -> None:
    problem = make_problem(n=10, m=6)
    problem = make_problem(n=10, m=6, targets=problem.weight @ problem.keys)
    torch.testing.assert_close(
        matched_keys(problem.weight, problem.keys, problem.targets), problem.keys, rtol=0, atol=1e-12
    )
    for target in ("exact", "least_change"):
        assert MOSEKey(target=target).solve(problem).norm < 1e-10


@pytest.mark.parametrize("n", [1, 10])
def test_the_least_change_is_the_one_of_its_optimality_conditions(make_problem, n: int) -> None:
    problem = make_problem(12, 24, n)
    found = least_changed_keys(problem.weight, problem.keys, problem.targets, problem.covariance)
    system = torch.zeros(36, 36, dtype=torch.float64)
    system[:24, :24], system[:24, 24:], system[24:, :24] = problem.covariance, problem.weight.T, problem.weight
    right = torch.cat([torch.zeros(24, n, dtype=torch.float64), problem.residual])
    expected = problem.keys + torch.linalg.solve(system, right)[:24]
    torch.testing.assert_close(problem.weight @ expected, problem.targets, rtol=0, atol=1e-9)
    expected = expected / expected.norm(dim=0) * problem.keys.norm(dim=0)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def stacked(problem: Problem, preservation: float) -> tuple[Tensor, Tensor]:
    """What Q is to take to what: preserved keys (with K0 such that K0 K0ᵀ = C) to themselves, keys to those sought."""
    values, vectors = torch.linalg.eigh(problem.covariance)
    kept = vectors @ torch.diag((preservation * values.clamp(min=0)).sqrt())
    if problem.memory is not None:
        kept = torch.cat([kept, problem.memory], dim=1)
    wanted = matched_keys(problem.weight, problem.keys, problem.targets)
    return torch.cat([kept, problem.keys], dim=1), torch.cat([kept, wanted], dim=1)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("d", "p"), SHAPES)
@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("m", [0, 6])
def test_it_is_the_procrustes_optimum(make_problem, d: int, p: int, n: int, m: int, seed: int) -> None:
    problem, preservation = make_problem(d, p, n, m, seed=seed), 2.0
    q = MOSEKey(preservation, method="svd").solve(problem).key_q
    assert orthogonality_error(q) < 1e-12
    a, b = stacked(problem, preservation)
    best = (q @ a - b).square().sum()
    gradient = 2 * (q @ a - b) @ a.T @ q.T
    torch.testing.assert_close(gradient - gradient.T, torch.zeros_like(gradient), rtol=0, atol=1e-10)
    generator = torch.Generator().manual_seed(seed)
    random = torch.linalg.qr(torch.randn(100, p, p, generator=generator, dtype=torch.float64)).Q
    assert (best <= (random @ a - b).square().sum(dim=(-2, -1))).all()


@pytest.mark.parametrize(("d", "p"), WIDE)
def test_a_key_that_counts_alone_reaches_its_target(make_problem, d: int, p: int) -> None:
    problem = reachable(make_problem, d, p)
    errors = []
    for preservation in (1e-1, 1e-4, 1e-8):
        update = MOSEKey(preservation).solve(problem)
        after = problem.weight + update.delta(problem.weight)
        errors.append(float((after @ problem.keys - problem.targets).norm() / problem.residual.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4
    assert MOSEKey(1e9).solve(problem).norm < 1e-5


@pytest.mark.parametrize("target", ["exact", "least_change"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-11)])
def test_the_spectrum_survives_three_hundred_edits(
    make_problem, dtype: torch.dtype, tolerance: float, target: str
) -> None:
    start = make_problem(16, 32, 2)
    weight = start.weight.to(dtype)
    before, values = spectrum_summary(weight), torch.linalg.svdvals(weight.double())
    solver, generator = MOSEKey(1.0, memory=True, target=target), torch.Generator().manual_seed(1)
    memory, moved = torch.zeros(32, 0, dtype=torch.float64), 0.0
    for _ in range(300):
        keys = start.keys.roll(1, 0) + 0.3 * torch.randn(32, 2, generator=generator, dtype=torch.float64)
        targets = torch.randn(16, 2, generator=generator, dtype=torch.float64)
        targets = targets / targets.norm(dim=0) * (weight.double() @ keys).norm(dim=0)
        update = solver.solve(Problem(weight, keys, targets, start.covariance, memory))
        update.apply_(weight)
        moved += update.norm
        memory = torch.cat([memory, keys], dim=1)[:, -50:]
    assert moved > 30  # not for want of rotation
    torch.testing.assert_close(torch.linalg.svdvals(weight.double()), values, rtol=tolerance, atol=0)
    after = spectrum_summary(weight)
    assert after.condition_number == pytest.approx(before.condition_number, rel=tolerance)
    assert after.frobenius == pytest.approx(before.frobenius, rel=tolerance)


def test_it_moves_other_outputs_less_than_a_rotation_of_outputs_does(make_problem) -> None:
    # The corpus's keys, of which the edited key is none, through each of the two, at the same share of the way gone.
    problem = reachable(make_problem, 16, 200)
    lengths = problem.targets / problem.targets.norm() * (problem.weight @ problem.keys).norm()
    problem = make_problem(16, 200, targets=lengths)
    moved = []
    for solver in (MOSEKey(1e-6), MOSE(1e-6)):
        delta = solver.solve(problem).delta(problem.weight)
        assert float((delta @ problem.keys - problem.residual).norm() / problem.residual.norm()) < 0.1
        moved.append(float(torch.trace(delta @ delta.T)))
    assert moved[0] < 0.5 * moved[1]


def test_a_zero_key_and_an_unknown_target_are_refused(make_problem) -> None:
    keys = make_problem(n=3).keys.clone()
    keys[:, 1] = 0
    with pytest.raises(ValueError, match=r"A key of layer 'blocks.0' is zero: no rotation can move its output"):
        MOSEKey().solve(make_problem(n=3, keys=keys))
    with pytest.raises(ValueError, match="'exact' or 'least_change', not 'nearest'"):
        MOSEKey(target="nearest")  # type: ignore[arg-type]
