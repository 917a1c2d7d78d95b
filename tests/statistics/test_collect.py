"""Statistics over a corpus: equal to plain loops, resumed to the last bit, shared by processes."""

from __future__ import annotations

import doctest
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_model, tiny_tokenizer
from helpers.references import hooks_left, projection_of
from torch import Tensor, nn

import lit_edit.statistics.covariance
import lit_edit.statistics.gradient
from lit_edit.statistics import (
    Collector,
    GradientCollector,
    KeyCollector,
    KeyCovariance,
    Statistics,
    StatisticsError,
    WeightGradient,
    collect,
    sequences_of,
)

TEXTS = ["The capital of France is Paris.", "Oslo", "", "Maria was born in Oslo and works in Rome, as all know."]
TEXTS += ["Why not? Because snow is cold.", "Rome is in France."] * 6
COLLECTORS = [KeyCollector, GradientCollector]
each_kind = pytest.mark.parametrize("kind", COLLECTORS, ids=lambda kind: kind.kind)
each_family = pytest.mark.parametrize("family", ["gpt2", "llama"])
LENGTH = 16


def modules(model: Any) -> dict[str, nn.Module]:
    return {f"layer {i}": projection_of(model, i) for i in (1, 2)}


def pieces(tokenizer: Any, bos: bool, most: int = 10_000) -> Iterator[list[int]]:
    """The sequences by hand, cut where the tokens end that may be read."""
    first = [tokenizer.bos_token_id] if bos else []
    room = LENGTH - len(first)
    for text in TEXTS:
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, max(len(own), 1), room):
            ids = (first + own[start : start + room])[:most]
            most -= len(ids)
            if ids:
                yield ids


def reference(kind: type[Collector], family: str, most: int = 10_000) -> dict[str, Tensor]:
    """Key by key, or by ordinary backpropagation, sequence after sequence, each without padding."""
    model, tokenizer = tiny_model(family)
    sums: dict[str, Tensor] = {}
    count = 0
    for ids in pieces(tokenizer, family == "llama", most):
        seen: dict[str, Tensor] = {}
        handles = [
            module.register_forward_pre_hook(lambda _, x, name=name, seen=seen: seen.__setitem__(name, x[0].detach()))
            for name, module in modules(model).items()
        ]
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        for handle in handles:
            handle.remove()
        if kind is KeyCollector:
            count += len(ids)
            found = {name: x[0].double().T @ x[0].double() for name, x in seen.items()}
        elif len(ids) > 1:
            count += len(ids) - 1
            nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum").backward()
            slopes = {f"layer {i}": projection_of(model, i).weight.grad.double() for i in (1, 2)}
            found = {name: slope.T if family == "gpt2" else slope for name, slope in slopes.items()}
        else:
            continue
        for name, matrix in found.items():
            sums[name] = sums.get(name, torch.zeros_like(matrix)) + matrix
    return {name: total / count for name, total in sums.items()}


@each_kind
@each_family
@pytest.mark.parametrize(("batch_size", "most"), [(1, 10_000), (3, 10_000), (100, 10_000), (2, 40)])
def test_it_equals_a_plain_loop(kind: type[Collector], family: str, batch_size: int, most: int) -> None:
    model, tokenizer = tiny_model(family)
    found, counted = collect(
        kind(modules(model)), model, tokenizer, TEXTS, max_tokens=most, sequence_length=LENGTH, batch_size=batch_size
    )
    for name, matrix in reference(kind, family, most).items():
        torch.testing.assert_close(found[name], matrix, rtol=1e-4, atol=1e-7)
        assert found[name].dtype == torch.float64
    assert counted.tokens == sum(map(len, pieces(tokenizer, family == "llama", most)))


@each_kind
def test_no_more_of_the_corpus_is_read_than_needed(kind: type[Collector]) -> None:
    model, tokenizer = tiny_model("gpt2")
    read = []

    def texts() -> Iterator[str]:
        for text in TEXTS:
            read.append(text)
            yield text

    collect(kind(modules(model)), model, tokenizer, texts(), max_tokens=12, sequence_length=LENGTH)
    assert len(read) < 5


@each_kind
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(kind: type[Collector], trainable: bool, training: bool) -> None:
    model, tokenizer = tiny_model("llama")
    model.requires_grad_(trainable).train(training)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    found, _ = collect(kind(modules(model)), model, tokenizer, TEXTS, max_tokens=500, sequence_length=LENGTH)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert hooks_left(model) == 0
    assert all(module.training is training for module in model.modules())
    assert all(p.grad is None and p.requires_grad is trainable for p in model.parameters())
    assert not any(matrix.requires_grad for matrix in found.values())


def test_a_step_against_the_gradient_lowers_the_loss_by_its_squared_norm() -> None:
    model, tokenizer = tiny_model("llama")
    model.double()
    name = "layer 1"
    collector = GradientCollector({name: projection_of(model, 1)})
    slope = collect(collector, model, tokenizer, TEXTS, max_tokens=500, sequence_length=64)[0][name]

    def loss() -> float:
        total, count = 0.0, 0
        for text in filter(None, TEXTS):
            ids = torch.tensor(tokenizer(text)["input_ids"])
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0]
            total += float(nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum"))
            count += len(ids) - 1
        return total / count

    before, step = loss(), 1e-4
    with torch.no_grad():
        projection_of(model, 1).weight.sub_(step * slope)
    assert (before - loss()) / step == pytest.approx(float(slope.square().sum()), rel=1e-2)


class Flat(nn.Module):
    """A model whose modules do not do what a projection does."""

    def __init__(self, runs: int) -> None:
        super().__init__()
        self.embedding, self.projection, self.runs = nn.Embedding(400, 4), nn.Linear(4, 400), runs

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        state = self.embedding(input_ids)
        for _ in range(self.runs):
            out = self.projection(state)
        return type("Output", (), {"logits": out if self.runs else state @ self.projection.weight.T})()


@each_kind
@pytest.mark.parametrize("runs", [0, 2])
def test_modules_that_do_not_run_once_are_named(kind: type[Collector], runs: int) -> None:
    model = Flat(runs)
    collector = kind({"here": model.projection})
    with pytest.raises(StatisticsError, match=f"here ran {runs} times"):
        collect(collector, model, tiny_tokenizer(bos=False), TEXTS, max_tokens=100)
    assert hooks_left(model) == 0


@each_kind
def test_bad_settings_are_refused(kind: type[Collector]) -> None:
    model, tokenizer = tiny_model("gpt2")
    for settings, error, message in (
        ({"sequence_length": 4096}, StatisticsError, r"sequence_length is 4096, the model takes \d+ tokens at most"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"texts": "one"}, TypeError, "a collection of texts, got a single one"),
        ({"texts": ["", ""]}, StatisticsError, "has no token that counts"),
    ):
        given: dict[str, Any] = {"texts": TEXTS, "max_tokens": 10, "sequence_length": LENGTH, **settings}  # type: ignore[dict-item]
        with pytest.raises(error, match=message):
            collect(kind(modules(model)), model, tokenizer, given.pop("texts"), **given)


# Sequences


@pytest.mark.parametrize("length", [2, 5, 16, 400])
def test_a_long_text_is_several_sequences_each_with_what_the_tokenizer_adds(length: int) -> None:
    tokenizer = tiny_tokenizer(bos=True)
    text = " ".join(TEXTS)
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = sequences_of(tokenizer, text, length)
    assert all(ids[0] == tokenizer.bos_token_id and len(ids) <= length for ids in found)
    assert [i for ids in found for i in ids[1:]] == own
    assert sequences_of(tokenizer, "", length) == [[tokenizer.bos_token_id]]
    with pytest.raises(StatisticsError, match="there is no room for any of its own"):
        sequences_of(tokenizer, text, 1)


# Interrupted


class Break(Exception):
    pass


def cut(after: int, error: type[BaseException] = Break) -> Iterator[str]:
    for i, text in enumerate(TEXTS):
        if i == after:
            raise error
        yield text


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of one batch, and sums saved after each."""
    monkeypatch.setattr("lit_edit.statistics.collecting._WINDOW", 1)
    monkeypatch.setattr("lit_edit.statistics.collecting._LONG", 0.0)
    monkeypatch.setattr("lit_edit.statistics.collecting._SHARE", 1e9)


Run = Callable[..., dict[str, Tensor]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def go(kind: type[Collector], texts: Any = TEXTS, identity: str = "same", **settings: Any) -> dict[str, Tensor]:
        model, tokenizer = tiny_model("llama")
        given = {"max_tokens": 150, "sequence_length": LENGTH, "batch_size": 2, "partial": tmp_path / "partial"}
        return collect(kind(modules(model)), model, tokenizer, texts, identity=identity, **{**given, **settings})[0]

    return go


@each_kind
@pytest.mark.parametrize("after", [2, 5, 9])
@pytest.mark.parametrize("error", [Break, KeyboardInterrupt])
@pytest.mark.usefixtures("short")
def test_a_cut_collection_resumes_to_the_last_bit(
    kind: type[Collector], after: int, error: type[BaseException], run: Run, tmp_path: Path
) -> None:
    whole = run(kind, partial=tmp_path / "other")
    with pytest.raises(error):
        run(kind, cut(after, error))
    assert (tmp_path / "partial").is_file()
    ran: list[int] = []
    model, tokenizer = tiny_model("llama")
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1))
    again, counted = collect(
        kind(modules(model)), model, tokenizer, TEXTS, max_tokens=150, sequence_length=LENGTH, batch_size=7,
        partial=tmp_path / "partial", identity="same",
    )  # fmt: skip
    handle.remove()
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert 0 < len(ran) < counted.windows  # in batches as large as before, and not those that were counted


@pytest.mark.usefixtures("short")
def test_what_cannot_be_resumed_says_what_to_do(run: Run, tmp_path: Path) -> None:
    with pytest.raises(Break):
        run(KeyCollector, cut(9))
    with pytest.raises(StatisticsError, match=r"does not begin with the texts .* delete .*partial"):
        run(KeyCollector, TEXTS[1:])
    with pytest.raises(StatisticsError, match=r"ends before the texts .* delete .*partial"):
        run(KeyCollector, TEXTS[:2])
    with pytest.raises(StatisticsError, match=r"of something else\. Delete .*partial"):
        run(KeyCollector, identity="other")
    content = bytearray((tmp_path / "partial").read_bytes())
    content[-5] ^= 1
    (tmp_path / "partial").write_bytes(content)
    with pytest.raises(StatisticsError, match=r"cannot be read: .*damaged.* Delete .*partial"):
        run(KeyCollector)


def test_a_long_collection_is_announced(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_edit.statistics.collecting._WINDOW", 1)
    run(KeyCollector, notify=said.append)
    assert said == []
    monkeypatch.setattr("lit_edit.statistics.collecting._LONG", -1.0)
    run(KeyCollector, notify=said.append)
    assert len(said) == 1
    assert said[0].startswith("Key covariance: 150 tokens, ")
    assert said[0].endswith(" to go.")


# The metrics


def test_the_covariance_is_that_of_a_plain_loop_over_the_keys_that_count() -> None:
    keys = torch.randn(3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    keys[~mask] = float("nan")  # what does not count may be anything
    expected = sum(torch.outer(key, key) for key in keys[mask])
    first, second = KeyCovariance(5), KeyCovariance(5)
    first.update(keys[:2], mask[:2])
    second.update(keys[2:], mask[2:])
    first.merge_state(second)
    assert int(first.count) == int(mask.sum())
    torch.testing.assert_close(first.compute(), expected / mask.sum())


def test_the_metrics_refuse() -> None:
    metric = KeyCovariance(2)
    with pytest.raises(ValueError, match=r"2 features last, got shape \(4, 3\)"):
        metric.update(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"mask of shape \(3,\) does not fit keys of shape \(4, 2\)"):
        metric.update(torch.ones(4, 2), torch.ones(3))
    with pytest.raises(ValueError, match="not finite"):
        metric.update(torch.full((4, 2), float("nan")))
    metric.reset()
    metric.update(torch.ones(4, 2), torch.zeros(4))
    with pytest.raises(ValueError, match="before a key was counted"):
        metric.compute()
    slopes = WeightGradient(2, 3)
    with pytest.raises(ValueError, match=r"slopes of shape \(4, 3\) do not fit inputs of shape \(4, 2\)"):
        slopes.update(torch.ones(4, 3), torch.ones(4, 2), 1)
    for bad in (lambda: KeyCovariance(0), lambda: WeightGradient(0, 2)):
        with pytest.raises(ValueError, match="at least one"):
            bad()


@pytest.mark.parametrize("module", [lit_edit.statistics.covariance, lit_edit.statistics.gradient])
def test_examples_run(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


# Several processes


def share(rank: int, world: int, store: str, out: str) -> None:
    """What each of some processes does: its share of the batches, the files by the first of them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model, tokenizer = tiny_model("gpt2")
    for kind in COLLECTORS:
        for most, size in ((150, 2), (140, 1000)):  # fewer batches than processes, too
            asked = Statistics(
                kind, model, tokenizer, TEXTS, "own", modules(model), out, max_tokens=most, sequence_length=LENGTH
            )
            asked.get(batch_size=size)
            assert not asked.missing()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_a_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    torch.multiprocessing.spawn(share, (2, str(tmp_path / "store"), str(tmp_path / "shared")), nprocs=2)
    model, tokenizer = tiny_model("gpt2")
    for kind in COLLECTORS:
        for most, size in ((150, 2), (140, 1000)):
            alone, shared = (
                Statistics(
                    kind, model, tokenizer, TEXTS, "own", modules(model), tmp_path / folder, max_tokens=most,
                    sequence_length=LENGTH,
                )
                for folder in ("alone", "shared")
            )  # fmt: skip
            found = shared.get(may_collect=False)
            for name, matrix in alone.get(batch_size=size).items():
                torch.testing.assert_close(found[name], matrix, rtol=1e-10, atol=1e-12)
            assert shared.headers == alone.headers
