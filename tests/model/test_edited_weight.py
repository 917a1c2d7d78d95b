"""`EditedWeight`: what is written, what is remembered, and that both come back whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.sites import normal, orthogonal, site_of
from torch import Tensor

from lit_edit.algebra.updates import Additive, LowRank, Rotation, Update
from lit_edit.model.edited_weight import EditedWeight, all_or_nothing

D, P = 12, 30
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *UNIT])
each_half = pytest.mark.parametrize("dtype", UNIT)
each_storage = pytest.mark.parametrize("transposed", [False, True])


def update(seed: int = 0) -> Update:
    return LowRank(normal(D, 2, seed=seed), normal(2, P, seed=seed + 1))


def layer(dtype: torch.dtype = torch.float32, transposed: bool = False, edits: int = 0) -> EditedWeight:
    """A layer after some edits, which solvers have kept tensors of and something else."""
    site = site_of(normal(D, P, seed=9).to(dtype), torch.eye(P), gradient=normal(D, P, seed=8), transposed=transposed)
    for i in range(1, edits + 1):
        site.write(update(i))
        site.remember([i], normal(P, 1, seed=i), normal(D, 1, seed=i), rank=2)
    if edits:
        site.kept = {"A.b": {"c": normal(3, 3), "known": torch.tensor(edits)}, "object": object()}
    return site


def content(site: EditedWeight) -> dict[str, Any]:
    """All that a failed batch and a checkpoint have to give back."""
    return {
        "stored": site.stored.clone(),
        "exact": site.exact.dense().clone(),
        "original": site.original.clone(),
        "keys": site.keys,
        "targets": site.targets,
        "counts": [site.edits, site.rank, site.forgotten, *site.owners, site.edited],
        "kept": {name: dict(value) for name, value in site.kept.items() if isinstance(value, dict)},
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# Writing


@each_dtype
@each_storage
def test_a_write_changes_the_parameter_and_the_original_can_be_had_back(dtype: torch.dtype, transposed: bool) -> None:
    site = layer(dtype, transposed)
    parameter, before = site.stored, site.weight.clone()
    assert site.shape == (D, P)
    assert site.original.data_ptr() == parameter.data_ptr()  # its own, while unedited
    assert (site.version, site.edited) == (0, False)
    for i in range(3):
        expected = site.exact.dense() + update(i).delta(site.weight)
        written = site.write(update(i))
        torch.testing.assert_close(site.exact.dense(), expected, rtol=2.0**-22, atol=1e-6)
        torch.testing.assert_close(site.weight, expected.to(dtype), rtol=2 * UNIT.get(dtype, 1e-7), atol=1e-6)
        assert (written.layer, site.version, site.edited) == (3, i + 1, True)
        assert written.relative_change > 0
        assert (written.rounding > 0) == (dtype != torch.float64)
    assert parameter.data_ptr() == site.stored.data_ptr()
    assert torch.equal(parameter.T if transposed else parameter, site.weight)
    copy = site.original_stored
    assert torch.equal(site.original, before)
    assert (copy.device.type, copy.dtype) == ("cpu", dtype)
    assert copy.data_ptr() == site.original.data_ptr() != parameter.data_ptr()
    site.remember([1], torch.ones(P, 1), torch.ones(D, 1))
    site.kept["A"] = object()
    site.restore()
    assert torch.equal(site.weight, before)
    torch.testing.assert_close(site.exact.dense(), before.double(), rtol=0, atol=0)  # and no remainder
    assert (site.version, site.edited, site.edits, site.rank, site.owners) == (4, False, 0, 0, [])
    assert site.keys.shape == (P, 0)
    assert site.kept == {}


def test_what_is_computed_from_the_weight_is_kept_until_the_next_write() -> None:
    site, made = layer(), []

    def ask() -> tuple[int, int]:
        site.cached("a", lambda: made.append("cached"))
        site.derived("b", lambda: made.append("derived"))
        return made.count("cached"), made.count("derived")

    assert [ask(), ask()] == [(1, 1), (1, 1)]
    site.write(update())
    assert [ask(), ask()] == [(2, 1), (2, 1)]
    site.replace(site.stored + 1)
    assert ask() == (3, 1)
    site.restore()
    assert ask() == (4, 1)
    site.gradient = normal(D, P)
    assert ask() == (5, 2)


@pytest.mark.parametrize("edits", [0, 1])
def test_a_weight_that_was_changed_by_other_means_is_refused(edits: int) -> None:
    site = layer(edits=edits)
    site.stored[0, 0] += 1
    asked: list[Callable[[], Any]] = [lambda: site.weight, lambda: site.stored, lambda: site.exact, site.state_dict]
    asked += [
        lambda: site.write(update()),
        *([] if edits else [lambda: site.original, lambda: site.replace(normal(D, P))]),
    ]
    for ask in asked:
        with pytest.raises(ValueError, match=r"'h\.3' was changed by other means than an edit.*Open a new session"):
            ask()


@each_storage
def test_an_update_that_does_not_fit_leaves_no_trace(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_edit.algebra.exact._ON_CPU", 5 * P)  # some pieces are written before one fails
    site, large = layer(torch.float16, transposed), torch.ones(D, P)
    large[-1, -1] = 1e6
    before = content(site)
    for bad, message in ((Additive(large), "out of the range"), (Additive(large.T), "does not fit a weight")):
        with pytest.raises(ValueError, match=message):
            site.write(bad)
    assert_same(content(site), before)
    assert site.version == 0
    site.write(update())


# Weights of 16 bits


@each_half
@each_storage
def test_changes_too_small_to_store_add_up(dtype: torch.dtype, transposed: bool) -> None:
    site = site_of(torch.ones(D, P, dtype=dtype), transposed=transposed)
    for _ in range(16):
        assert site.write(Additive(torch.full((D, P), UNIT[dtype] / 4))).rounding <= 1
    assert (site.weight == 1 + 4 * UNIT[dtype]).all()


@each_half
def test_a_sum_of_edits_and_a_spectrum_are_off_by_one_rounding_however_many_they_were(dtype: torch.dtype) -> None:
    site, exact = layer(dtype), normal(D, P, seed=9).to(dtype).double()
    for i in range(60):
        turn = Rotation(orthogonal(D, D, seed=i))
        for change in (turn, update(i), turn.inverse(), update(i).inverse()):
            exact += change.delta(exact)
            site.write(change)
    torch.testing.assert_close(site.exact.dense(), exact, rtol=0, atol=2e-4)
    torch.testing.assert_close(site.weight.double(), exact, rtol=1.01 * UNIT[dtype], atol=2e-4)
    values = torch.linalg.svdvals(exact)
    for i in range(60):
        site.write(Rotation(orthogonal(D, D, seed=i)))
        once = float((site.weight.double() - site.exact.dense()).norm())  # no values move by more (Mirsky)
        assert float((torch.linalg.svdvals(site.weight.double()) - values).norm()) <= 1.2 * once


# All or nothing


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("edits", [0, 2])
@pytest.mark.parametrize(("dtype", "transposed"), [(torch.float32, True), (torch.bfloat16, False)])
def test_an_error_gives_everything_back(
    error: type[BaseException], edits: int, dtype: torch.dtype, transposed: bool
) -> None:
    sites = [layer(dtype, transposed, edits) for _ in range(3)]  # the last one is not written to
    before, version = [content(site) for site in sites], sites[0].version
    shown = [site.cached("norm", lambda site=site: float(site.weight.norm())) for site in sites]
    seen = set()

    def fail() -> None:
        with all_or_nothing(sites):
            for site in sites[:2]:
                for i in (5, 6):
                    site.write(update(i))
                    site.cached("norm", lambda: math.nan)
                    seen.add(site.version)
                site.remember([5, 6], normal(P, 2), normal(D, 2))
                site.forget([1])
                site.kept["A.b"] = {}
            sites[0].replace(sites[0].stored + 1)
            sites[1].restore()
            raise error

    for _ in range(2):
        with pytest.raises(error):
            fail()
        for site, expected, norm in zip(sites, before, shown, strict=True):
            assert_same(content(site), expected)
            assert site.version == version
            assert site.cached("norm", lambda site=site: float(site.weight.norm())) == norm
    sites[0].write(update())
    assert sites[0].version not in seen  # no number stands for two contents
    with all_or_nothing(sites):
        sites[1].write(update())
    assert torch.equal(sites[1].weight, sites[0].weight)


# What is remembered


def test_edits_are_remembered_forgotten_and_counted() -> None:
    site = layer()
    site.remember([1, 2], normal(P, 2, seed=1), normal(D, 2, seed=2))
    site.remember([3], normal(P, 1, seed=3), normal(D, 1, seed=4), rank=4)
    site.count(5)
    assert (site.edits, site.rank, site.owners) == (8, 11, [1, 2, 3])
    site.count(5)
    assert site.rank == D
    assert (site.keys.dtype, site.keys.shape, site.targets.shape) == (torch.float32, (P, 3), (D, 3))
    assert torch.equal(site.keys, torch.cat([normal(P, 2, seed=1), normal(P, 1, seed=3)], 1).float())
    site.forget([7])
    assert site.forgotten == 0
    keys = site.keys
    site.forget([2, 7])
    assert (site.owners, site.forgotten, site.edits) == ([1, 3], 1, 13)
    assert torch.equal(site.keys, keys[:, [0, 2]])
    site.forget([1, 3])
    assert (site.keys.shape, site.owners, site.forgotten) == ((P, 0), [], 2)


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("covariance", torch.eye(D), r"'h\.3': the key covariance must have shape \(30, 30\) .* it has \(12, 12\)"),
        ("covariance", torch.full((P, P), math.nan), "the key covariance holds values that are not finite"),
        ("gradient", torch.ones(P, D), r"the gradient must have shape \(12, 30\)"),
        ("gradient", torch.full((D, P), math.inf), "the gradient holds values that are not finite"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(name: str, found: Tensor, message: str) -> None:
    site = layer(transposed=True)
    with pytest.raises(ValueError, match=message):
        setattr(site, name, found)


def test_another_covariance_forgets_what_solvers_kept() -> None:
    site = layer(edits=1)
    site.covariance = 2 * torch.eye(P)
    assert site.kept == {}


# Checkpoints


@each_dtype
@each_storage
@pytest.mark.parametrize("edits", [0, 3])
@pytest.mark.parametrize("since", [0, 2])
def test_a_layer_goes_on_from_its_state_to_the_last_bit(
    dtype: torch.dtype, transposed: bool, edits: int, since: int
) -> None:
    site, again = layer(dtype, transposed, edits), layer(dtype, transposed, since)
    state = site.state_dict()
    assert ("stored" in state) == bool(edits)
    assert all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in state.values())
    again.load_state_dict(state)
    assert_same(content(again), content(site))
    for one in (site, again):
        one.write(update(7))
        one.remember([9], normal(P, 1), normal(D, 1))
        one.forget([2])
    assert_same(content(again), content(site))


def test_what_is_kept_of_a_weight_that_is_no_more_is_not_saved() -> None:
    site, again = layer(edits=2), layer()
    for version, kept in ((site.version, True), (site.version - 1, False)):
        site.kept = {"A": {"version": torch.tensor(version), "b": normal(2, 2)}}
        again.load_state_dict(site.state_dict())
        assert ("A" in again.kept) == kept
        assert not kept or int(again.kept["A"]["version"]) == again.version


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": None}, r"state of layer 'h\.3' has nothing for keys, not \(30, 2\)"),
        ({"targets": torch.ones(D, 3)}, r"has \(12, 3\) for targets, not \(12, 2\)"),
        ({"counts": torch.ones(2)}, r"has \(2,\) for counts, not \(3,\)"),
        ({"owners": None}, "for keys"),
        (
            {"stored": torch.ones(P, D).bfloat16()},
            r"'h\.3' as torch\.bfloat16 of shape \(30, 12\), the model has it as",
        ),
        ({"stored": torch.ones(D, P)}, r"as torch\.float32 of shape \(12, 30\), the model has it as torch\.bfloat16"),
        ({"stored": torch.full((D, P), math.nan).bfloat16()}, "values of stored that are not finite"),
        ({"keys": torch.full((P, 2), math.inf)}, "values of keys that are not finite"),
        ({"kept.A.b.c": torch.tensor(math.nan)}, r"values of kept\.A\.b\.c that are not finite"),
        ({"stored": None}, "remainder of layer 'h.3' does not belong to its weight"),
        ({"remainder": torch.zeros(P, D, dtype=torch.int16)}, "remainder of layer 'h.3' does not belong"),
        ({"remainder": torch.zeros(D, P)}, "remainder of layer 'h.3' does not belong"),
        ({"weights": torch.zeros(1)}, "has weights, which belongs to no layer"),
    ],
)
def test_a_foreign_or_damaged_state_is_refused_and_nothing_happens(
    changes: dict[str, Tensor | None], message: str
) -> None:
    site, state = layer(torch.bfloat16, edits=1), layer(torch.bfloat16, edits=2).state_dict() | changes
    before = content(site)
    with pytest.raises(ValueError, match=message):
        site.load_state_dict({name: tensor for name, tensor in state.items() if tensor is not None})
    assert_same(content(site), before)
