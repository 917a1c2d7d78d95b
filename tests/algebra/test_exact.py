"""Weights in float64, piece by piece against the whole, and what rounding took of them."""

import pytest
import torch
from helpers.sites import normal

from lit_edit.algebra.exact import ExactWeight, can_have_remainder, no_remainder, pieces, remainder_of, widened

D, P = 24, 56
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces as small as a large weight's are beside it."""
    for name, size in (("_ON_CPU", 5 * P), ("_NARROW", 5), ("_WIDE", 5)):
        monkeypatch.setattr(f"lit_edit.algebra.exact.{name}", size)


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
    weight = normal(D, P, seed=9).to(dtype)
    if transposed:
        weight = weight.T.contiguous().T
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


@pytest.mark.parametrize("dtype", UNIT)
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


def test_only_16_bits_have_a_remainder() -> None:
    assert [can_have_remainder(dtype) for dtype in (*UNIT, torch.float32, torch.float64)] == [True, True, False, False]
