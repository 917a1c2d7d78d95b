import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lit_edit.algebra.linalg import svd_of_rank
from lit_edit.editors.restraints import PRUNE, Ground


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ground(d: int = 16, p: int = 48, seed: int = 0, size: float = 5.0, edits: int = 100, batch: int = 0) -> Ground:
    """A weight that lies off its original by a few large and many small singular values."""
    original = normal(d, p, seed=seed)
    values = torch.linspace(size, 0.01, min(d, p), dtype=torch.float64) ** 2
    u = torch.linalg.qr(normal(d, d, seed=seed + 1)).Q[:, : len(values)]
    v = torch.linalg.qr(normal(p, p, seed=seed + 2)).Q[:, : len(values)]
    return Ground(original + (u * values) @ v.T, original, edits=edits, batch=batch, layer="h.3")


def pruned(prune: PRUNE, here: Ground) -> Tensor:
    """The weight after `total` at the end of a run."""
    update = prune.total(here, last=True)
    weight = here.weight.clone()
    if update is not None:
        update.apply_(weight)
    return weight


def restrained(sigma: float, largest: float, form: str, alpha: float, beta: float) -> float:
    """Eq. 4 and 5, and the linear form of appendix C.3, with the logarithm to base α as it is written."""
    if sigma <= largest:
        return sigma
    if form == "log":
        return math.log(sigma, alpha) - math.log(largest, alpha) + largest
    return sigma / beta + (beta - 1) / beta * largest


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("d", "p"), [(12, 24), (16, 48), (24, 24), (30, 20)])
@pytest.mark.parametrize(
    ("form", "alpha", "beta"), [("log", 1.2, 2.0), ("log", math.e, 2.0), ("linear", 1.2, 2.0), ("linear", 9.0, 5.0)]
)
def test_large_singular_values_of_the_sum_are_cut_and_nothing_else(
    d: int, p: int, form: str, alpha: float, beta: float, seed: int
) -> None:
    here = ground(d, p, seed)
    before = here.weight.clone()
    found = pruned(PRUNE(alpha, form, beta), here) - here.original  # type: ignore[arg-type]
    torch.testing.assert_close(here.weight, before, rtol=0, atol=0)
    # Plain reference: all singular values, one by one, with the vectors of ΔW's two Gram matrices.
    total, largest = here.weight - here.original, float(torch.linalg.svdvals(here.original)[0])
    values, right = torch.linalg.eigh(total.T @ total if p <= d else total @ total.T)
    expected = torch.zeros_like(total)
    for value, vector in zip(values.clamp(min=0).sqrt().tolist(), right.T, strict=True):
        share = torch.outer(total @ vector, vector) if p <= d else torch.outer(vector, vector @ total)
        expected += restrained(value, largest, form, alpha, beta) / value * share
    assert largest < values.max().sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert float((found - total).norm()) > 1


@pytest.mark.parametrize("form", ["log", "linear"])
def test_the_pruned_sum_takes_the_place_of_the_sum(form: str) -> None:
    # Not on top of the edited weight: W_n + ΔW' would keep the unpruned edits.
    here = ground()
    total = here.weight - here.original
    after = pruned(PRUNE(1.5, form), here)  # type: ignore[arg-type]
    largest = float(torch.linalg.svdvals(here.original)[0])
    values = torch.linalg.svdvals(total)
    expected = [restrained(v, largest, form, 1.5, 2.0) for v in values.tolist()]
    torch.testing.assert_close(
        torch.linalg.svdvals(after - here.original), torch.tensor(sorted(expected, reverse=True), dtype=torch.float64)
    )
    wrong = torch.linalg.svdvals(after - here.original + total)
    assert float(wrong[0]) > 1.5 * expected[0]


def test_a_large_original_leaves_everything_as_it_is() -> None:
    here = ground()
    big = replace(here, original=1000 * here.original, weight=1000 * here.original + (here.weight - here.original))
    for form in ("log", "linear"):
        assert PRUNE(form=form).total(big, last=True) is None


def test_a_layer_without_edits_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError

    here = ground()
    monkeypatch.setattr(torch.linalg, "svd", never)
    monkeypatch.setattr(torch.linalg, "matrix_norm", never)
    assert PRUNE().total(replace(here, weight=here.original.clone()), last=True) is None


@pytest.mark.parametrize("largest", [2.0, 7.0, 40.0])
@pytest.mark.parametrize(
    "prune", [PRUNE(1.2), PRUNE(1.5), PRUNE(math.e), PRUNE(form="linear"), PRUNE(form="linear", beta=9)]
)
def test_it_is_continuous_and_rises_and_never_enlarges(prune: PRUNE, largest: float) -> None:
    sigma = torch.linspace(0.01, 50 * largest, 5001, dtype=torch.float64)
    found = prune.restrained(sigma, torch.tensor(largest, dtype=torch.float64))
    assert (found.diff() > 0).all()
    assert (found <= sigma + 1e-12).all()
    torch.testing.assert_close(found[sigma <= largest], sigma[sigma <= largest], rtol=0, atol=0)
    nearby = torch.tensor([largest * (1 + 1e-9)], dtype=torch.float64)
    assert float(prune.restrained(nearby, torch.tensor(largest, dtype=torch.float64))) == pytest.approx(
        largest, rel=1e-8
    )
    assert float(found[-1]) < 0.9 * float(sigma[-1])


@pytest.mark.parametrize(("alpha", "largest"), [(1.2, 5.5), (1.2, 7.0), (1.5, 2.5), (math.e, 1.0), (math.e, 7.0)])
def test_the_logarithm_is_equation_5_wherever_that_restrains(alpha: float, largest: float) -> None:
    assert largest * math.log(alpha) >= 1  # its slope at σ_max is 1 / (σ_max ln α)
    sigma = torch.linspace(0.1, 50, 300, dtype=torch.float64)
    found = PRUNE(alpha).restrained(sigma, torch.tensor(largest, dtype=torch.float64))
    expected = [restrained(s, largest, "log", alpha, 2.0) for s in sigma.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_where_equation_5_would_enlarge_nothing_changes() -> None:
    sigma, largest = 2.5, 2.0
    assert restrained(sigma, largest, "log", 1.2, 2.0) > sigma
    one = torch.tensor([sigma], dtype=torch.float64)
    assert float(PRUNE(1.2).restrained(one, torch.tensor(largest, dtype=torch.float64))) == sigma


@pytest.mark.parametrize(
    ("told", "rank"),
    [
        ({"edits_here": 3, "batch_here": 2, "edits": 40, "batch": 9}, 5),
        ({"edits_here": 3, "batch_here": 2, "rank_here": 11}, 11),
        ({"edits": 40, "batch": 9}, 0),
    ],
)
def test_the_rank_tried_first_counts_the_layer_alone(
    told: dict[str, int], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def recorded(matrix: Tensor, rank: int, negligible: float) -> tuple[Tensor, Tensor, Tensor]:
        tried.append(rank)
        return svd_of_rank(matrix, rank, negligible)

    monkeypatch.setattr("lit_edit.editors.restraints.prune.svd_of_rank", recorded)
    here = ground()
    update = PRUNE(1.5).total(replace(here, **(told | {"batch": 0})), last=True)
    assert tried == [rank]
    plain = PRUNE(1.5).total(here, last=True)
    assert update is not None
    assert plain is not None
    torch.testing.assert_close(update.delta(here.weight), plain.delta(here.weight), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("every_n", "edits", "batch", "last", "due"),
    [
        (None, 100, 1, False, False),
        (None, 100, 0, True, True),
        (None, 101, 0, True, True),
        (50, 49, 1, False, True),
        (50, 50, 1, False, False),
        (50, 48, 1, False, False),
        (50, 45, 10, False, True),  # crossed within the batch
        (50, 40, 10, False, True),
        (50, 50, 10, False, False),
        (50, 0, 120, False, True),
        (1, 7, 1, False, True),
        (50, 100, 0, True, False),
        (50, 120, 0, True, False),
    ],
)
def test_when_it_is_due(every_n: int | None, edits: int, batch: int, last: bool, due: bool) -> None:
    update = PRUNE(1.5, every_n=every_n).total(ground(edits=edits, batch=batch), last=last)
    assert (update is not None) == due


def test_it_leaves_the_single_update_alone_and_says_what_it_needs() -> None:
    here = ground()
    update = PRUNE(1.5).total(here, last=True)
    assert update is not None
    assert PRUNE().restrain(update, here) is update
    assert PRUNE.needs_original
    assert not PRUNE.needs_gradient
    with pytest.raises(ValueError, match=r"needs the weight of layer 'h.3' as it was before the first edit"):
        PRUNE().total(replace(here, original=None), last=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.0}, "alpha must be above 1 and finite, got 1.0"),
        ({"alpha": 0.5}, "alpha must be above 1"),
        ({"alpha": float("nan")}, "alpha must be above 1"),
        ({"form": "linear", "beta": 1.0}, "beta must be above 1"),
        ({"form": "square"}, "'log' or 'linear', not 'square'"),
        ({"every_n": 0}, "1 or more, not 0"),
    ],
)
def test_bad_settings_are_refused(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PRUNE(**settings)
