import pytest
import torch
from helpers.sites import Case, normal, orthogonal, random_case
from torch import Tensor

from lit_edit.algebra.linalg import orthogonality_error
from lit_edit.algebra.updates import Rotation
from lit_edit.editors.solvers import MOSE


def stacked(case: Case, preservation: float) -> tuple[Tensor, Tensor]:
    """A and B of MOSE Eq. 18, with K0 such that K0 K0ᵀ = C, and the memory beside it."""
    values, vectors = torch.linalg.eigh(case.covariance)
    kept = torch.cat([vectors * (preservation * values.clamp(min=0)).sqrt(), case.memory], dim=1)
    kept, outputs = case.weight @ kept, case.weight @ case.keys
    return torch.cat([kept, outputs], dim=1), torch.cat([kept, case.targets], dim=1)


def objective(q: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (q @ a - b).square().sum(dim=(-2, -1))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("d", "p"), [(12, 24), (40, 96), (24, 24)])
@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("m", [0, 6])
def test_mose_is_the_procrustes_optimum(d: int, p: int, n: int, m: int, seed: int) -> None:
    case, preservation = random_case(d, p, n, m, seed=seed), 2.0
    update = case.solve(MOSE(preservation))
    assert isinstance(update, Rotation)
    q = update.turn
    assert orthogonality_error(q) < 1e-12

    a, b = stacked(case, preservation)
    u, _, ht = torch.linalg.svd(b @ a.T)
    torch.testing.assert_close(q, u @ ht, rtol=0, atol=1e-8)
    gradient = 2 * (q @ a - b) @ a.T @ q.T  # on the orthogonal group only its skew part counts
    torch.testing.assert_close(gradient, gradient.T, rtol=0, atol=1e-10)

    best = objective(q, a, b)
    assert (best <= objective(orthogonal(200, d, d, seed=seed), a, b)).all()
    skew = normal(20, d, d, seed=seed)
    for size in (1e-1, 1e-2, 1e-3):
        nudged = torch.linalg.matrix_exp(size * (skew - skew.mT) / 2) @ q
        assert (best <= objective(nudged, a, b) + 1e-12 * best).all()


def test_preservation_weighs_old_against_new() -> None:
    case = random_case().then(1)
    eager, shy = case.solve(MOSE(1e-9)), case.solve(MOSE(1e9))
    reached = (case.weight + eager.delta(case.weight)) @ case.keys
    torch.testing.assert_close(reached, case.targets, rtol=0, atol=1e-5)
    assert shy.norm < 1e-5
