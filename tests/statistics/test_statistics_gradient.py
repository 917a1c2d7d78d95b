"""The gradient of the language-model loss over a corpus, as a statistic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from helpers.references import changed, hooks_left, matrix_of, projection_of, weights
from torch import Tensor, nn

from lit_edit.editors import LocateThenEdit
from lit_edit.editors.layers import FixedLayers
from lit_edit.editors.restraints import OEditPlus
from lit_edit.editors.solvers import ROME
from lit_edit.editors.values import OEdit, ValueOptimizer
from lit_edit.session import EditSession
from lit_edit.statistics import (
    StatisticsError,
    StatisticsHeader,
    WeightGradient,
    collect_gradients,
    covariances,
    gradients,
    load_covariances,
    load_gradients,
    save_covariances,
    save_gradients,
)

TEXTS = ["The capital of France is Paris.", "Oslo", "", "Maria was born in Oslo and works in Rome, as all know."]
TEXTS += ["Why not? Because snow is cold.", "Rome is in France."]
each_family = pytest.mark.parametrize("family", ["gpt2", "llama"])


def modules(model: Any) -> dict[str, nn.Module]:
    return {f"layer {i}": projection_of(model, i) for i in (1, 2)}


def reference(model: Any, tokenizer: Any, length: int, most: int = 10_000) -> dict[str, Tensor]:
    """∇G (d, p) by ordinary backpropagation, sequence after sequence, each without padding."""
    sums = {f"layer {i}": torch.zeros_like(matrix_of(model, i), dtype=torch.float64) for i in (1, 2)}
    predicted = 0
    first = [0] if model.config.model_type == "llama" else []  # BOS, at the start of each sequence
    room = length - len(first)
    sequences = []
    for text in TEXTS:
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        sequences += [first + own[i : i + room] for i in range(0, max(len(own), 1), room)]
    for sequence in sequences:
        ids = sequence[:most]
        most -= len(ids)
        if len(ids) < 2:
            continue
        model.zero_grad(set_to_none=True)
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        torch.stack([-log_p[t - 1, ids[t]] for t in range(1, len(ids))]).sum().backward()
        predicted += len(ids) - 1
        for i in (1, 2):
            slope = projection_of(model, i).weight.grad.double()
            sums[f"layer {i}"] += slope.T if model.config.model_type == "gpt2" else slope
    model.zero_grad(set_to_none=True)
    return {name: total / predicted for name, total in sums.items()}


@each_family
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_it_is_the_gradient_of_the_mean_loss_over_tokens(family: str, batch_size: int) -> None:
    model, tokenizer = tiny_model(family)
    found = collect_gradients(model, tokenizer, TEXTS, modules(model), sequence_length=9, batch_size=batch_size)
    assert list(found) == ["layer 1", "layer 2"]
    assert all(gradient.dtype == torch.float64 for gradient in found.values())
    torch.testing.assert_close(found, reference(model, tokenizer, 9), rtol=1e-4, atol=1e-7)


@each_family
def test_a_step_against_it_lowers_the_loss_by_its_squared_norm(family: str) -> None:
    model, tokenizer = tiny_model(family)
    model = model.double().requires_grad_(False)
    found = collect_gradients(model, tokenizer, TEXTS, modules(model), sequence_length=64)["layer 1"]

    def loss() -> float:
        total, count = 0.0, 0
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.long)
            if ids.shape[1] > 1:
                total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
                count += ids.shape[1] - 1
        return total / count

    before, size = loss(), 1e-4
    stored = projection_of(model, 1).weight
    stored.sub_(size * (found.T if family == "gpt2" else found))
    assert (before - loss()) / size == pytest.approx(float(found.square().sum()), rel=1e-2)


@each_family
def test_it_stops_at_max_tokens_and_reads_no_further(family: str) -> None:
    model, tokenizer = tiny_model(family)
    read: list[str] = []

    def stream() -> Iterator[str]:
        for text in TEXTS:
            read.append(text)
            yield text

    found = collect_gradients(
        model, tokenizer, stream(), modules(model), max_tokens=15, sequence_length=9, batch_size=2
    )
    torch.testing.assert_close(found, reference(model, tokenizer, 9, 15), rtol=1e-4, atol=1e-7)
    assert len(read) < len(TEXTS)


@each_family
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was_and_runs_in_evaluation_mode(family: str, trainable: bool, training: bool) -> None:
    model, tokenizer = tiny_model(family)
    plain = collect_gradients(model, tokenizer, TEXTS, modules(model), sequence_length=64)
    model.requires_grad_(trainable).train(training)
    before, modes = weights(model), {name: m.training for name, m in model.named_modules()}
    with torch.no_grad():  # as the session may be opened
        found = collect_gradients(model, tokenizer, TEXTS, modules(model), sequence_length=64)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-9)
    assert changed(before, model) == set()
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert hooks_left(model) == 0
    for parameter in model.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == trainable


def test_what_cannot_be_collected_is_an_error_and_leaves_no_hook() -> None:
    model, tokenizer = tiny_model("gpt2")
    with pytest.raises(StatisticsError, match="no text of two tokens"):
        collect_gradients(model, tokenizer, ["", "a"], modules(model), sequence_length=64)
    with pytest.raises(StatisticsError, match="elsewhere ran 0 times"):
        collect_gradients(model, tokenizer, TEXTS, {"elsewhere": nn.Linear(2, 2)}, sequence_length=64)
    with pytest.raises(StatisticsError, match="'block' should be a linear projection"):
        collect_gradients(model, tokenizer, TEXTS, {"block": model.transformer.h[1].attn}, sequence_length=64)
    with pytest.raises(ValueError, match="no modules to collect gradients for"):
        collect_gradients(model, tokenizer, TEXTS, {})
    with pytest.raises(TypeError, match="got a single one"):
        collect_gradients(model, tokenizer, "text", modules(model))
    with pytest.raises(StatisticsError, match="takes 128 tokens at most"):
        collect_gradients(model, tokenizer, TEXTS, modules(model), sequence_length=129)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(StatisticsError, match="gradient of module 'layer 1' holds values that are not finite"):
        collect_gradients(model, tokenizer, TEXTS, modules(model), sequence_length=64)
    assert hooks_left(model) == 0


def test_the_metric_is_the_mean_over_all_that_was_added_in_whatever_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    g, x = torch.randn(2, 9, 3, generator=generator), torch.randn(2, 9, 5, generator=generator)
    first, second = WeightGradient(3, 5), WeightGradient(3, 5)
    first.update(g[:, :4], x[:, :4], 3)
    second.update(g[0, 4:], x[0, 4:], 0)
    second.update(g[1, 4:], x[1, 4:], 4)
    first.merge_state(second)
    expected = sum(torch.outer(a, b) for a, b in zip(g.reshape(-1, 3).double(), x.reshape(-1, 5).double(), strict=True))
    torch.testing.assert_close(first.compute(), expected / 7)
    with pytest.raises(ValueError, match=r"of 3 rows and 5 columns, slopes of shape \(2, 9, 3\) do not fit inputs of"):
        first.update(g, x[:, :4], 1)
    with pytest.raises(ValueError, match="at least one row and one column, got 0 and 5"):
        WeightGradient(0, 5)
    nothing = WeightGradient(3, 5)
    nothing.update(g, x, 0)
    with pytest.raises(ValueError, match="no gradient of a mean over no summand"):
        nothing.compute()


def test_the_metrics_example_holds() -> None:
    import doctest

    import lit_edit.statistics.gradient

    assert doctest.testmod(lit_edit.statistics.gradient) == (0, 3)


# As a file


@each_family
def test_the_second_time_the_file_is_read(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model(family)
    part = modules(model)
    first = gradients(model, tokenizer, iter(TEXTS), "texts", part, tmp_path, sequence_length=64)
    torch.testing.assert_close(first, collect_gradients(model, tokenizer, TEXTS, part, sequence_length=64))
    path, _ = tmp_path.glob("lm_gradient-*.safetensors")  # one for each layer
    covariances(model, tokenizer, TEXTS * 2, "texts", part, tmp_path, sequence_length=64)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    monkeypatch.setattr("lit_edit.statistics.kept.collect", None)
    second = gradients(model, tokenizer, TEXTS, "texts", part, tmp_path, sequence_length=64)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    for changed_call in ((TEXTS[1:], 64), (TEXTS, 63)):  # another corpus, another length: collected anew
        with pytest.raises(TypeError):
            gradients(model, tokenizer, changed_call[0], "texts", part, tmp_path, sequence_length=changed_call[1])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StatisticsError, match="cannot be read"):
        gradients(model, tokenizer, TEXTS, "texts", part, tmp_path, sequence_length=64)


def header(kind: str = "lm_gradient") -> StatisticsHeader:
    return StatisticsHeader(kind, "m", "t", ("a", "b"), "c", "s", 10, 5, n_tokens=9)


def test_gradients_are_saved_and_loaded_under_their_own_kind(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    held = {name: torch.randn(3, 5, generator=generator) for name in ("b", "a")}
    path = tmp_path / "folder" / "file.safetensors"
    save_gradients(path, held, header())
    found = load_gradients(path, replace(header(), n_tokens=None))
    assert list(found) == ["a", "b"]
    torch.testing.assert_close(found, {name: held[name].double() for name in ("a", "b")}, rtol=0, atol=0)
    with pytest.raises(StatisticsError, match="kind: found 'lm_gradient', expected 'key_covariance'"):
        load_covariances(path, header("key_covariance"))
    with pytest.raises(StatisticsError, match="of kind 'key_covariance', for gradients it is 'lm_gradient'"):
        save_gradients(path, held, header("key_covariance"))
    with pytest.raises(StatisticsError, match="of kind 'lm_gradient', for covariances it is 'key_covariance'"):
        save_covariances(path, held, header())
    with pytest.raises(StatisticsError, match="covariance of layer 'b' must be a square float64 matrix"):
        save_covariances(path, held, header("key_covariance"))
    with pytest.raises(StatisticsError, match="gradient of layer 'a' must be a float64 matrix"):
        save_gradients(path, held | {"a": torch.ones(3)}, header())
    with pytest.raises(StatisticsError, match="gradient of layer 'a' holds values that are not finite"):
        save_gradients(path, held | {"a": torch.full((2, 2), float("inf"))}, header())
    with pytest.raises(StatisticsError, match=r"collect them with .* or lit_edit\.statistics\.gradients"):
        load_gradients(tmp_path / "none", header())


# In a session


@each_family
@pytest.mark.parametrize("part", ["restraint", "penalty", "none"])
def test_a_session_collects_what_its_editor_asks_for(family: str, part: str) -> None:
    model, tokenizer = tiny_model(family)
    editor = LocateThenEdit(
        FixedLayers([1, 2]),
        ValueOptimizer(penalties=[OEdit()] if part == "penalty" else None),
        ROME(),
        restraints=[OEditPlus()] if part == "restraint" else None,
        contexts=0,
    )
    texts = (f"{text} {i}" for i in range(12) for text in TEXTS)  # a stream, which both statistics are taken from
    workspace = EditSession(model, tokenizer, editor, texts, "texts").workspace
    assert sorted(workspace.covariances) == [1, 2]
    if part == "none":
        assert workspace.gradients == {}
        assert not workspace.originals.keeps
        return
    expected = collect_gradients(
        model, tokenizer, [f"{text} {i}" for i in range(12) for text in TEXTS], modules(model), sequence_length=128
    )
    for i in (1, 2):
        torch.testing.assert_close(workspace.gradients[i], expected[f"layer {i}"])
        torch.testing.assert_close(workspace.original(i), matrix_of(model, i))
        assert workspace.gradients[i].shape == matrix_of(model, i).shape
