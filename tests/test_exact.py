"""Weights in float64 piece by piece against the whole, and writing in pieces."""

import math

import pytest
import torch
from torch import Tensor

from lit_edit.exact import ExactWeight, pieces
from lit_edit.updates import (
    Additive,
    BlockKeyRotation,
    KeyRotation,
    LowRank,
    Rotation,
    ThinKeyRotation,
    ThinRotation,
    Update,
)

D, P = 24, 56


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(*shape: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(*shape, seed=seed)).Q


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces as small as a large weight's are beside it."""
    monkeypatch.setattr("lit_edit.exact._ON_CPU", 5 * P)
    for width in (
        "lit_edit.exact._NARROW",
        "lit_edit.exact._WIDE",
        "lit_edit.updates._NARROW",
        "lit_edit.updates._WIDE",
    ):
        monkeypatch.setattr(width, 5)


def stored(dtype: torch.dtype, transposed: bool) -> Tensor:
    weight = normal(D, P, seed=9).to(dtype)
    return weight.T.contiguous().T if transposed else weight


def test_pieces_make_up_the_whole() -> None:
    weight = torch.zeros(D, P)
    for dim in (0, 1):
        places = list(pieces(weight, dim))
        assert len(places) > 3
        assert sorted(i for place in places for i in range(place.start, place.stop)) == list(range(weight.shape[dim]))
    assert [place.stop - place.start for place in pieces(weight, 0, 20)] == [20, 4]
    assert list(pieces(torch.zeros(0, 3), 0)) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_in_pieces_are_those_of_the_whole(dtype: torch.dtype, transposed: bool) -> None:
    weight = stored(dtype, transposed)
    exact, whole = ExactWeight(weight), weight.double()
    root, x, y = normal(P, P, seed=1), normal(P, 3, seed=2), normal(D, 3, seed=3)
    pairs = [
        (exact @ x, whole @ x),
        (exact @ x[:, 0], whole @ x[:, 0]),
        (exact @ x[:, :0].float(), whole @ x[:, :0]),
        (exact.back(y), whole.T @ y),
        (exact.spread(root @ root.T), whole @ root @ root.T @ whole.T),
        (exact.dense(), whole),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert exact.norm() == pytest.approx(float(whole.norm()), rel=1e-14)
    assert exact.shape == (D, P)


def updates() -> list[Update]:
    return [
        LowRank(normal(D, 2), normal(2, P, seed=1)),
        Additive(normal(D, P, seed=2)),
        Rotation(orthogonal(D, D, seed=3)),
        KeyRotation(orthogonal(P, P, seed=4)),
        BlockKeyRotation(orthogonal(7, 8, 8, seed=5)),
        ThinRotation(orthogonal(D, 3, seed=6), orthogonal(3, 3, seed=7)),
        ThinKeyRotation(orthogonal(P, 3, seed=6), orthogonal(3, 3, seed=7)),
    ]


@pytest.mark.parametrize("update", updates(), ids=lambda u: type(u).__name__)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_writing_in_pieces_writes_the_whole(update: Update, transposed: bool, dtype: torch.dtype) -> None:
    weight = stored(dtype, transposed)
    before, delta = weight.clone(), update.delta(weight)
    relative, rounding = update.write_(weight)
    wanted = before.double() + delta
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(weight.double(), wanted, rtol=unit, atol=1e-14)
    assert relative == pytest.approx(float(delta.norm() / before.double().norm()), rel=1e-12)
    lost = float((weight.double() - wanted).norm() / delta.norm())
    assert rounding == pytest.approx(lost, rel=1e-6, abs=1e-15)
    assert (rounding > 0) == (dtype == torch.float32)
    update.undo_(weight)
    torch.testing.assert_close(weight, before, rtol=0, atol=20 * unit)


@pytest.mark.parametrize("transposed", [False, True])
def test_no_piece_is_written_where_one_cannot_be_stored(transposed: bool) -> None:
    change = torch.zeros(D, P)
    change[-1, -1] = 1e6
    weight = stored(torch.float16, transposed)
    before = weight.clone()
    with pytest.raises(ValueError, match=r"Additive of norm 1e\+06 takes the weight of shape .* out of the range"):
        (Additive(change + 1)).apply_(weight)
    assert torch.equal(weight, before)
    weight[-1, -1] = math.nan
    with pytest.raises(ValueError, match="out of the range"):
        Additive(torch.ones(D, P)).apply_(weight)
    assert torch.equal(weight[:-1], before[:-1])
