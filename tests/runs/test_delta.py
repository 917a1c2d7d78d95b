"""A delta turns the original into the edited model, and nothing else into anything."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import assert_same_weights
from safetensors.torch import load_file

from lit_edit.files import save_tensors
from lit_edit.model.families import Architecture
from lit_edit.model.fingerprint import model_fingerprint
from lit_edit.runs.delta import DeltaError, load_delta, save_delta


def edited(model: Any, rank: int | None = 2) -> tuple[Any, dict[str, torch.Tensor]]:
    """A copy with a change in two layers, dense or of some rank, and the weights of three layers as they were."""
    other = copy.deepcopy(model)
    parts = Architecture(other).layers[:3]
    originals = {part.name: part.projection.weight.detach().clone() for part in parts}
    g = torch.Generator().manual_seed(0)
    for part in parts[:2]:
        d, p = part.weight.shape
        change = torch.randn(d, p, generator=g)
        if rank is not None:
            change = torch.randn(d, rank, generator=g) @ torch.randn(rank, p, generator=g)
        part.weight.add_(change.to(part.weight.dtype))
    return other, originals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_exact_delta_gives_the_edited_model_bit_by_bit(tiny, dtype: torch.dtype, tmp_path: Path) -> None:
    original = tiny[0].to(dtype)
    new, before = edited(original)
    path = tmp_path / "deltas" / "one.safetensors"
    header = save_delta(path, new, before, original=model_fingerprint(original), method="rome", edits=3)
    assert header.parameters == tuple(list(before)[:2])  # the third layer did not change
    assert header.error == 0
    assert load_delta(original, path) == header
    assert_same_weights(original, new)
    assert [p.name for p in path.parent.iterdir()] == ["one.safetensors"]


def test_a_thin_delta_is_small_and_keeps_its_tolerance(tiny, tmp_path: Path) -> None:
    original = tiny[0]
    new, before = edited(original, rank=1)
    exact, thin = tmp_path / "exact.safetensors", tmp_path / "thin.safetensors"
    fingerprint = model_fingerprint(original)
    save_delta(exact, new, before, original=fingerprint)
    header = save_delta(thin, new, before, original=fingerprint, tolerance=1e-5)
    assert 0 < header.error <= 1e-5
    assert header.edited is None
    kept = {name: tensor.shape for name, tensor in load_file(thin).items()}
    assert len(kept) == 4
    assert all(1 in shape for shape in kept.values())
    load_delta(original, thin)
    for name in header.parameters:
        one, other = original.get_parameter(name).detach(), new.get_parameter(name).detach()
        assert 0 < float((one - other).norm() / other.norm()) <= 1e-5


def test_a_dense_change_is_kept_whole_whatever_the_tolerance(tiny, tmp_path: Path) -> None:
    new, before = edited(tiny[0], rank=None)
    path = tmp_path / "dense.safetensors"
    header = save_delta(path, new, before, original=model_fingerprint(tiny[0]), tolerance=1e-4)
    assert header.error == 0
    load_delta(tiny[0], path)
    assert_same_weights(tiny[0], new)


def test_another_model_an_edited_one_and_another_precision_are_refused_untouched(tiny, tmp_path: Path) -> None:
    original = tiny[0]
    new, before = edited(original)
    path = tmp_path / "delta.safetensors"
    save_delta(path, new, before, original=model_fingerprint(original))
    with pytest.raises(DeltaError, match="is in this model already"):
        load_delta(copy.deepcopy(new), path)
    for other in (copy.deepcopy(original).to(torch.bfloat16), edited(new)[0]):
        untouched = copy.deepcopy(other)
        with pytest.raises(DeltaError, match=r"belongs to another model.*unedited, in the precision"):
            load_delta(other, path)
        assert_same_weights(other, untouched)


def test_a_fingerprint_that_tells_nothing_apart_is_not_relied_on(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, before = edited(tiny[0])
    with monkeypatch.context() as patch:
        patch.setattr("lit_edit.runs.delta.model_fingerprint", lambda _: "the same for all")
        header = save_delta(tmp_path / "d", new, before, original="the same for all")
        assert header.edited is None
        load_delta(tiny[0], tmp_path / "d")
    assert_same_weights(tiny[0], new)


def test_a_delta_without_a_change_changes_nothing(tiny, tmp_path: Path) -> None:
    before = {part.name: part.projection.weight.detach().clone() for part in Architecture(tiny[0]).layers}
    header = save_delta(tmp_path / "d", tiny[0], before, original=model_fingerprint(tiny[0]))
    assert header.parameters == ()
    assert load_delta(tiny[0], tmp_path / "d").edited is None


def test_a_change_of_rank_one_in_a_few_columns_is_applied(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1024, 256, bias=False))
    before = {"0.weight": model[0].weight.detach().clone()}
    original = model_fingerprint(model)
    key = torch.zeros(1024)
    key[[1, 3, 517]] = 1.0  # a sample of every fourth value would meet none of them
    new = copy.deepcopy(model)
    with torch.no_grad():
        new[0].weight.add_(torch.outer(torch.ones(256), key))
    assert save_delta(tmp_path / "d", new, before, original=original).edited != original
    load_delta(model, tmp_path / "d")
    assert_same_weights(model, new)


def test_a_file_of_an_earlier_format_says_what_to_do(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, before = edited(tiny[0])
    save_delta(tmp_path / "d", new, before, original="")
    monkeypatch.setattr("lit_edit.runs.delta.FORMAT_VERSION", 3)
    with pytest.raises(DeltaError, match=r"format is version 2, this program reads 3\. Make it again .*export --delta"):
        load_delta(tiny[0], tmp_path / "d")


def test_files_that_are_no_deltas_are_refused(tiny, tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match="There is no delta at"):
        load_delta(tiny[0], tmp_path / "nothing.safetensors")
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors here")
    with pytest.raises(DeltaError, match="cannot be read"):
        load_delta(tiny[0], text)
    foreign = tmp_path / "foreign.safetensors"
    save_tensors(foreign, {"a": torch.zeros(2)}, {})
    with pytest.raises(DeltaError, match="has not exactly the fields"):
        load_delta(tiny[0], foreign)


def test_bad_arguments_are_refused(tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tolerance is -0\.1"):
        save_delta(tmp_path / "x", tiny[0], {}, original="", tolerance=-0.1)
    with pytest.raises(ValueError, match="no parameter 'nowhere'"):
        save_delta(tmp_path / "x", tiny[0], {"nowhere": torch.zeros(1)}, original="")
