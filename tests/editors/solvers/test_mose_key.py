import pytest
import torch
from helpers.sites import Case, normal, orthogonal, random_case
from torch import Tensor

from lit_edit.algebra.linalg import orthogonality_error
from lit_edit.algebra.updates import Rotation
from lit_edit.editors.solvers import MOSE
from lit_edit.editors.solvers.mose_key import MOSEKey, least_changed_keys, matched_keys

WIDE = [(12, 24), (40, 96)]


def reachable(d: int = 16, p: int = 48, n: int = 1, m: int = 0, seed: int = 0) -> Case:
    """Targets that the weight has for keys of the right length: outputs of other keys, a little shorter."""
    case, others = random_case(d, p, n, m, seed=seed), normal(p, n, seed=seed + 100)
    others = 0.8 * others / others.norm(dim=0) * case.keys.norm(dim=0)
    return case.fresh(targets=case.weight @ others)


def matched(case: Case, targets: Tensor | None = None) -> Tensor:
    return matched_keys(case.weight, case.keys, case.targets if targets is None else targets)


def assert_same_length(found: Tensor, keys: Tensor) -> None:
    torch.testing.assert_close(found.norm(dim=0), keys.norm(dim=0), rtol=1e-12, atol=0)


def assert_same_direction(found: Tensor, wanted: Tensor, atol: float) -> None:
    cosine = torch.cosine_similarity(found, wanted, dim=0)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=atol)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("d", "p"), WIDE)
@pytest.mark.parametrize("n", [1, 10])
def test_the_key_sought_has_the_same_length_and_gives_the_target(d: int, p: int, n: int, seed: int) -> None:
    case = reachable(d, p, n, seed=seed)
    found = matched(case)
    torch.testing.assert_close(case.weight @ found, case.targets, rtol=0, atol=1e-11)
    assert_same_length(found, case.keys)
    # Of all such keys it is the nearest to k: on the sphere that means the largest product with it.
    free = torch.linalg.svd(case.weight).Vh[d:].T
    row = found - free @ (free.T @ found)
    for other_seed in range(50):
        other = free @ normal(p - d, n, seed=other_seed)
        other = row + other / other.norm(dim=0) * (found - row).norm(dim=0)
        torch.testing.assert_close(case.weight @ other, case.targets, rtol=0, atol=1e-11)
        assert ((found * case.keys).sum(0) >= (other * case.keys).sum(0) - 1e-12).all()


@pytest.mark.parametrize("n", [1, 10])
def test_a_target_out_of_reach_is_met_in_direction(n: int) -> None:
    case = reachable(n=n)
    far = 50 * case.targets
    far[:, 0] = case.targets[:, 0]
    found = matched(case, far)
    assert_same_length(found, case.keys)
    output = case.weight @ found
    assert_same_direction(output, far, 1e-10)
    torch.testing.assert_close(output[:, 0], far[:, 0], rtol=0, atol=1e-11)  # the others do not disturb it
    assert (output.norm(dim=0)[1:] < far.norm(dim=0)[1:]).all()
    # The sphere has nothing nearer to W⁺v.
    row = torch.linalg.lstsq(case.weight, far, driver="gelsd").solution
    for size in (1e-3, 1e-1, 1.0):
        other = found + size * normal(*found.shape, seed=1)
        other = other / other.norm(dim=0) * found.norm(dim=0)
        assert ((found - row).norm(dim=0)[1:] <= (other - row).norm(dim=0)[1:]).all()


@pytest.mark.parametrize("shrink", [0.1, 0.9, 3.0])
def test_without_a_null_space_the_direction_is_met(shrink: float) -> None:
    case = reachable(24, 24, 5)
    found = matched(case, shrink * case.targets)
    assert_same_length(found, case.keys)
    assert_same_direction(case.weight @ found, case.targets, 1e-8)


def test_a_key_without_a_null_space_part_is_lengthened_where_it_stands() -> None:
    weight = reachable().weight
    key = weight.T @ torch.ones(16, 1, dtype=torch.float64)
    target = 0.3 * weight @ key
    torch.testing.assert_close(matched_keys(weight, key, target), key, rtol=1e-10, atol=1e-12)
    # Nothing to point at either: the key is left alone.
    torch.testing.assert_close(matched_keys(weight, key, torch.zeros_like(target)), key, rtol=0, atol=0)


def test_present_outputs_ask_for_no_rotation() -> None:
    case = random_case(n=10, m=6)
    case = case.fresh(targets=case.weight @ case.keys)
    torch.testing.assert_close(matched(case), case.keys, rtol=0, atol=1e-12)
    for target in ("exact", "least_change"):
        assert case.solve(MOSEKey(target=target)).norm < 1e-10  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [1, 10])
def test_the_least_change_is_the_one_of_its_optimality_conditions(n: int) -> None:
    case = random_case(12, 24, n)
    found = least_changed_keys(case.weight, case.keys, case.targets, case.covariance)
    system = torch.zeros(36, 36, dtype=torch.float64)
    system[:24, :24], system[:24, 24:], system[24:, :24] = case.covariance, case.weight.T, case.weight
    right = torch.cat([torch.zeros(24, n, dtype=torch.float64), case.residual])
    expected = case.keys + torch.linalg.solve(system, right)[:24]
    torch.testing.assert_close(case.weight @ expected, case.targets, rtol=0, atol=1e-9)
    expected = expected / expected.norm(dim=0) * case.keys.norm(dim=0)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("d", "p"), [*WIDE, (24, 24), (30, 20)])
@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("m", [0, 6])
def test_it_is_the_procrustes_optimum(d: int, p: int, n: int, m: int) -> None:
    case, preservation = random_case(d, p, n, m), 2.0
    update = case.solve(MOSEKey(preservation, method="svd"))
    assert isinstance(update, Rotation)
    q = update.turn
    assert orthogonality_error(q) < 1e-12
    # What Q is to take to what: preserved keys (with K0 such that K0 K0ᵀ = C) to themselves, keys to those sought.
    values, vectors = torch.linalg.eigh(case.covariance)
    kept = torch.cat([vectors * (preservation * values.clamp(min=0)).sqrt(), case.memory], dim=1)
    a, b = torch.cat([kept, case.keys], dim=1), torch.cat([kept, matched(case)], dim=1)
    gradient = 2 * (q @ a - b) @ a.T @ q.T
    torch.testing.assert_close(gradient, gradient.T, rtol=0, atol=1e-10)
    best = (q @ a - b).square().sum()
    assert (best <= (orthogonal(100, p, p) @ a - b).square().sum(dim=(-2, -1))).all()


@pytest.mark.parametrize(("d", "p"), WIDE)
def test_a_key_that_counts_alone_reaches_its_target(d: int, p: int) -> None:
    case, errors = reachable(d, p), []
    for preservation in (1e-1, 1e-4, 1e-8):
        after = case.weight + case.delta(MOSEKey(preservation))
        errors.append(float((after @ case.keys - case.targets).norm() / case.residual.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4
    assert case.solve(MOSEKey(1e9)).norm < 1e-5


def test_it_moves_other_outputs_less_than_a_rotation_of_outputs_does() -> None:
    # The corpus's keys, of which the edited key is none, through each of the two, at the same share of the way gone.
    case = reachable(16, 200)
    case = case.fresh(targets=case.targets / case.targets.norm() * (case.weight @ case.keys).norm())
    moved = []
    for solver in (MOSEKey(1e-6), MOSE(1e-6)):
        delta = case.delta(solver)
        assert float((delta @ case.keys - case.residual).norm() / case.residual.norm()) < 0.1
        moved.append(float(delta.square().sum()))
    assert moved[0] < 0.5 * moved[1]
