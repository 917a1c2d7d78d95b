"""Weights in float64 piece by piece against the whole, and writing in pieces."""

import math

import pytest
import torch
from torch import Tensor

from lit_edit.algebra.exact import ExactWeight, can_have_remainder, no_remainder, pieces, remainder_of, widened
from lit_edit.algebra.updates import (
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
    monkeypatch.setattr("lit_edit.algebra.exact._ON_CPU", 5 * P)
    for width in (
        "lit_edit.algebra.exact._NARROW",
        "lit_edit.algebra.exact._WIDE",
        "lit_edit.algebra.updates._NARROW",
        "lit_edit.algebra.updates._WIDE",
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


HALF = (torch.bfloat16, torch.float16)
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("dtype", HALF)
def test_a_weight_and_its_remainder_are_as_good_as_float32(dtype: torch.dtype) -> None:
    sizes = torch.logspace(-9 if dtype == torch.bfloat16 else -5, 4.8, 40).double()
    exact = sizes[:, None] * normal(40, 60).clamp(-1, 1)
    exact[0, :4] = torch.tensor([0.0, -0.0, 1 + UNIT[dtype], -1 - 3 * UNIT[dtype]])  # the last two halfway
    stored = exact.to(dtype)
    remainder = remainder_of(exact, stored)
    assert remainder.element_size() == 2
    found = widened(stored, remainder)
    torch.testing.assert_close(found, exact, rtol=2.0**-22.99, atol=0 if dtype == torch.bfloat16 else 2.0**-35)
    assert torch.equal(found.to(dtype), stored)
    whole = ExactWeight(stored, remainder)
    for transposed in (whole, ExactWeight(stored.T.contiguous().T, remainder)):
        torch.testing.assert_close(transposed.dense(), found, rtol=0, atol=0)
        for dim in (0, 1):
            got = torch.cat([transposed.piece(dim, place) for place in pieces(stored, dim)], dim=dim)
            torch.testing.assert_close(got, found, rtol=0, atol=0)
    assert whole.eps == torch.finfo(torch.float32).eps
    torch.testing.assert_close(widened(stored, no_remainder(stored)), stored.double(), rtol=0, atol=0)


def test_wider_weights_have_no_remainder() -> None:
    assert [can_have_remainder(dtype) for dtype in (*HALF, torch.float32, torch.float64)] == [True, True, False, False]
    with pytest.raises(ValueError, match=r"A remainder of shape \(56, 24\) is none of a weight of shape \(24, 56\)"):
        Additive(torch.ones(D, P)).apply_(torch.zeros(D, P).half(), torch.zeros(P, D).half())


@pytest.mark.parametrize("update", updates(), ids=lambda u: type(u).__name__)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_writing_with_a_remainder_goes_on_from_the_sum(update: Update, transposed: bool, dtype: torch.dtype) -> None:
    weight = stored(dtype, transposed)
    exact, remainder = weight.double(), no_remainder(weight)
    for _ in range(3):
        exact = exact + update.delta(exact)
        relative, rounding = update.write_(weight, remainder)
        assert relative > 0
        assert 0 < rounding < 1
        torch.testing.assert_close(weight.double(), exact, rtol=UNIT[dtype] * 1.01, atol=1e-6)
        torch.testing.assert_close(widened(weight, remainder), exact, rtol=1e-6, atol=3e-6)
    for _ in range(3):
        update.undo_(weight, remainder)
    torch.testing.assert_close(widened(weight, remainder), stored(dtype, transposed).double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_changes_too_small_to_store_add_up(dtype: torch.dtype) -> None:
    weight, step = torch.ones(D, P, dtype=dtype), Additive(torch.full((D, P), UNIT[dtype] / 4))
    alone, remainder = weight.clone(), no_remainder(weight)
    for _ in range(16):
        step.apply_(alone)
        assert step.apply_(weight, remainder) <= 1
    assert (alone == 1).all()
    assert (weight == 1 + 4 * UNIT[dtype]).all()


@pytest.mark.parametrize("dtype", HALF)
def test_the_spectrum_of_a_rotated_weight_is_off_by_one_rounding_however_often_it_was_turned(
    dtype: torch.dtype,
) -> None:
    weight = stored(dtype, False)
    alone, remainder, start = weight.clone(), no_remainder(weight), torch.linalg.svdvals(weight.double())
    drift: dict[str, list[float]] = {"carried": [], "alone": []}
    for turn in range(60):
        update = Rotation(orthogonal(D, D, seed=turn))
        update.apply_(weight, remainder)
        update.apply_(alone)
        for name, found in (("carried", weight), ("alone", alone)):
            drift[name].append(float((torch.linalg.svdvals(found.double()) - start).norm()))
    once = float((weight.double() - widened(weight, remainder)).norm())  # no singular values move by more (Mirsky)
    assert max(drift["carried"]) <= 1.2 * once
    assert max(drift["carried"][-10:]) < 2 * max(drift["carried"][:10])
    assert drift["alone"][-1] > 3 * max(drift["carried"])


@pytest.mark.parametrize("transposed", [False, True])
def test_a_remainder_stays_with_its_weight_where_a_result_cannot_be_stored(transposed: bool) -> None:
    weight = stored(torch.float16, transposed)
    remainder = no_remainder(weight)
    Additive(normal(D, P)).apply_(weight, remainder)
    before, carried, change = weight.clone(), remainder.clone(), torch.ones(D, P)
    change[-1, -1] = 1e6
    with pytest.raises(ValueError, match="out of the range"):
        Additive(change).apply_(weight, remainder)
    assert torch.equal(weight, before)
    assert torch.equal(remainder, carried)
