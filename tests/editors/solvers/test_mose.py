import pytest
import torch
from torch import Tensor

from lit_edit.algebra.linalg import orthogonality_error, spectrum_summary
from lit_edit.editors.solvers import MOSE, Problem

SHAPES = [(12, 24), (16, 48), (40, 96), (24, 24)]


def stacked(problem: Problem, preservation: float) -> tuple[Tensor, Tensor]:
    """A and B of MOSE Eq. 18, with K0 such that K0 K0ᵀ = C, and the memory beside it."""
    values, vectors = torch.linalg.eigh(problem.covariance)
    kept = problem.weight @ vectors @ torch.diag((preservation * values.clamp(min=0)).sqrt())
    if problem.memory is not None:
        kept = torch.cat([kept, problem.weight @ problem.memory], dim=1)
    return torch.cat([kept, problem.weight @ problem.keys], dim=1), torch.cat([kept, problem.targets], dim=1)


def objective(q: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (q @ a - b).square().sum(dim=(-2, -1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("d", "p"), SHAPES)
@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("m", [0, 6])
def test_mose_is_the_procrustes_optimum(make_problem, d: int, p: int, n: int, m: int, seed: int) -> None:
    problem, preservation = make_problem(d, p, n, m, seed=seed), 2.0
    q = MOSE(preservation).solve(problem).q
    assert orthogonality_error(q) < 1e-12

    a, b = stacked(problem, preservation)
    u, _, ht = torch.linalg.svd(b @ a.T)
    torch.testing.assert_close(q, u @ ht, rtol=0, atol=1e-8)

    generator = torch.Generator().manual_seed(seed)
    best = objective(q, a, b)
    random = torch.linalg.qr(torch.randn(200, d, d, generator=generator, dtype=torch.float64)).Q
    assert (best <= objective(random, a, b)).all()
    skew = torch.randn(20, d, d, generator=generator, dtype=torch.float64)
    for size in (1e-1, 1e-2, 1e-3):
        nudged = torch.linalg.matrix_exp(size * (skew - skew.mT) / 2) @ q
        assert (best <= objective(nudged, a, b) + 1e-12 * best).all()


def test_gradient_on_the_orthogonal_group_is_zero(make_problem) -> None:
    problem = make_problem(16, 48, 10, 6)
    a, b = stacked(problem, 1.0)
    q = MOSE().solve(problem).q
    gradient = 2 * (q @ a - b) @ a.T @ q.T
    torch.testing.assert_close(gradient - gradient.T, torch.zeros_like(gradient), rtol=0, atol=1e-10)


def test_preservation_weighs_old_against_new(make_problem) -> None:
    problem = make_problem()
    wanted = problem.targets * (problem.weight @ problem.keys).norm() / problem.targets.norm()
    problem = make_problem(targets=wanted)
    eager, shy = MOSE(1e-9).solve(problem), MOSE(1e9).solve(problem)
    torch.testing.assert_close((problem.weight + eager.delta(problem.weight)) @ problem.keys, wanted, rtol=0, atol=1e-5)
    assert shy.norm < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize(("d", "p", "n"), [(12, 48, 1), (16, 48, 10), (24, 24, 1)])
def test_the_spectrum_survives_a_thousand_edits(
    make_problem, d: int, p: int, n: int, dtype: torch.dtype, tolerance: float
) -> None:
    start = make_problem(d, p, n)
    weight = start.weight.to(dtype)
    before, values = spectrum_summary(weight), torch.linalg.svdvals(weight.double())
    solver, generator = MOSE(preservation=1.0, memory=True), torch.Generator().manual_seed(1)
    memory = torch.zeros(p, 0, dtype=torch.float64)
    moved = 0.0
    for _ in range(1000):
        keys = start.keys.roll(1, 0) + 0.3 * torch.randn(p, n, generator=generator, dtype=torch.float64)
        present = weight.double() @ keys
        targets = torch.randn(d, n, generator=generator, dtype=torch.float64)
        targets = targets / targets.norm(dim=0) * present.norm(dim=0)
        update = solver.solve(Problem(weight, keys, targets, start.covariance, memory))
        update.apply_(weight)
        moved += update.norm
        memory = torch.cat([memory, keys], dim=1)[:, -50:]
    after = spectrum_summary(weight)
    assert weight.dtype == dtype
    assert moved > 100  # not for want of rotation
    # Rounding moves every singular value by a like amount, so a badly conditioned (square) weight cannot keep its
    # smallest ones to the same relative accuracy in float32; against the largest one all of them stay.
    found = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(found, values, rtol=0, atol=tolerance * before.spectral_norm)
    if d < p:
        torch.testing.assert_close(found, values, rtol=tolerance, atol=0)
        assert after.condition_number == pytest.approx(before.condition_number, rel=tolerance)
    assert after.frobenius == pytest.approx(before.frobenius, rel=tolerance)
    assert after.spectral_norm == pytest.approx(before.spectral_norm, rel=tolerance)
