"""Rotations along sequences of edits: thin solutions against the dense ones, and what all of them leave as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.sites import Case, normal, random_case, site_of
from torch import Tensor

from lit_edit.algebra.linalg import orthogonality_error, spectrum_summary
from lit_edit.algebra.updates import Additive, Rotation
from lit_edit.editors.solvers import MOSE, MOSEKey
from lit_edit.editors.solvers.mose_key import least_changed_keys, matched_keys

D, P = 128, 144
Turning = MOSE | MOSEKey
SOLVERS: dict[str, Callable[..., Turning]] = {
    "mose": lambda **more: MOSE(preservation=5.0, **more),
    "mose without memory": lambda **more: MOSE(preservation=5.0, memory=False, **more),
    "mose-key": lambda **more: MOSEKey(preservation=5.0, **more),
    "mose-key, least change": lambda **more: MOSEKey(preservation=5.0, target="least_change", **more),
}
each_solver = pytest.mark.parametrize("name", SOLVERS)


def layer(d: int = D, p: int = P, dtype: torch.dtype = torch.float64) -> Case:
    case = random_case(d, p)
    return Case(site_of(case.weight.to(dtype), 10 * case.covariance), case.keys, case.targets)


def turned(case: Case, solver: Turning) -> Tensor:
    """Q."""
    update = case.solve(solver)
    assert isinstance(update, Rotation)
    assert (update.basis is not None) == (solver.method == "krylov")
    identity = torch.eye(update.size, dtype=torch.float64)
    return identity + update.delta(identity)


def wanted_keys(solver: MOSEKey, case: Case) -> Tensor:
    if solver.target == "exact":
        return matched_keys(case.weight, case.keys, case.targets)
    return least_changed_keys(case.weight, case.keys, case.targets, case.covariance)


def objective(solver: Turning, case: Case, q: Tensor) -> float:
    """What Q is to make small, summed term by term: ‖Q X − Y‖² over preserved and new columns."""
    root = torch.linalg.cholesky(case.covariance) * solver.preservation**0.5
    kept, new = torch.cat([root, solver.remembered(case.site)], dim=1), case.keys
    if isinstance(solver, MOSE):
        kept, new, wanted = case.weight @ kept, case.weight @ new, case.targets
    else:
        wanted = wanted_keys(solver, case)
    return float((q @ kept - kept).square().sum() + (q @ new - wanted).square().sum())


@each_solver
@pytest.mark.parametrize(
    ("n", "dtype", "fold"),
    [
        (1, torch.float64, False),
        (1, torch.float64, True),
        (2, torch.float64, False),
        (1, torch.float32, False),
        (1, torch.bfloat16, False),
    ],
)
def test_every_edit_of_a_sequence_is_as_good_as_the_dense_solution(
    name: str, n: int, dtype: torch.dtype, fold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fold:  # remembered keys go into the eigenbasis
        for module in ("mose", "mose_key"):
            monkeypatch.setattr(f"lit_edit.editors.solvers.{module}.FOLD_AT", 4)
    case, thin, exact = layer(dtype=dtype), SOLVERS[name](), SOLVERS[name](method="svd")
    start = torch.linalg.svdvals(case.weight)
    for i in range(12):
        case = case.then(i, n)
        q, best = turned(case, thin), turned(case, exact)
        assert orthogonality_error(q) < 1e-12
        reached, least = objective(exact, case, q), objective(exact, case, best)
        nothing = objective(exact, case, torch.eye(len(q), dtype=torch.float64))
        assert reached - least < (1e-7 if dtype == torch.float64 else 1e-6) * nothing
        assert least < 0.99 * nothing
        case.write(thin)
    if dtype == torch.float64:
        torch.testing.assert_close(torch.linalg.svdvals(case.weight), start, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("solver", "d", "p", "n", "dtype"),
    [
        (MOSE(memory=False, method="svd"), 16, 48, 10, torch.float64),
        (MOSE(memory=False, method="svd"), 16, 48, 10, torch.float32),
        (MOSE(memory=False, method="svd"), 24, 24, 1, torch.float32),
        (MOSE(), 64, 96, 1, torch.float32),
        (MOSE(memory=False), 64, 96, 1, torch.float64),
        (MOSEKey(), 16, 64, 1, torch.float32),
        (MOSEKey(method="svd"), 16, 32, 2, torch.float32),
        (MOSEKey(method="svd", target="least_change"), 16, 32, 2, torch.float64),
    ],
)
def test_the_spectrum_survives_hundreds_of_edits(solver: Turning, d: int, p: int, n: int, dtype: torch.dtype) -> None:
    case, moved = layer(d, p, dtype), 0.0
    before, values = spectrum_summary(case.weight), torch.linalg.svdvals(case.weight)
    for i in range(300):
        case = case.then(i, n)
        moved += case.write(solver).update.norm
    assert moved > 30  # not for want of rotation
    assert case.site.weight.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-10
    # Rounding moves every singular value by a like amount, so a badly conditioned (square) weight cannot keep its
    # smallest ones to the same relative accuracy in float32; against the largest one all of them stay.
    found, after = torch.linalg.svdvals(case.weight), spectrum_summary(case.weight)
    torch.testing.assert_close(found, values, rtol=0, atol=tolerance * before.spectral_norm)
    if d < p:
        torch.testing.assert_close(found, values, rtol=tolerance, atol=0)
        assert after.condition_number == pytest.approx(before.condition_number, rel=tolerance)
    assert after.frobenius == pytest.approx(before.frobenius, rel=tolerance)
    if solver.method == "krylov":
        assert orthogonality_error(turned(case, solver)) < 1e-13
    if solver.method == "krylov" and isinstance(solver, MOSE):
        assert orthogonality_error(case.site.kept["MOSE.eigenvectors"]["vectors"]) < 1e-12


@pytest.mark.parametrize("name", ["mose", "mose-key"])
def test_what_nothing_is_known_of_is_turned_least(name: str) -> None:
    case = layer().then(1)
    few = torch.linalg.cholesky(case.covariance)[:, :40]
    case.site.covariance = few @ few.T
    thin, exact = turned(case, SOLVERS[name]()), turned(case, SOLVERS[name](method="svd"))
    torch.testing.assert_close(thin, exact, rtol=0, atol=1e-5)


def test_keys_are_matched_with_a_triangle_of_the_weight_before_rounding() -> None:
    case, solver, name = layer(dtype=torch.float32), MOSEKey(5.0), "MOSEKey.triangle"

    def assert_matched(case: Case) -> None:
        found = solver._matched(case.site, case.keys, case.targets)
        torch.testing.assert_close(found, wanted_keys(solver, case), rtol=0, atol=1e-9)

    triangles = set()
    for i in range(30):
        case = case.then(i)
        assert_matched(case)
        case.write(solver)
        triangles.add(id(case.site.kept[name]["triangle"]))
    assert len(triangles) == 1
    case.site.write(Additive(0.5 * normal(D, P)))
    assert_matched(case.then(40))
    assert id(case.site.kept[name]["triangle"]) not in triangles
    same = torch.zeros(D, P, dtype=torch.float64)
    same[1] = case.weight[0] - case.weight[1]
    case.site.write(Additive(same))  # no full row rank
    assert_matched(case.then(41))
