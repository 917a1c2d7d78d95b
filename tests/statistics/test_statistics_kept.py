"""Statistics as files of single layers, collections that are cut and gone on with, and sums over several processes."""

from __future__ import annotations

import json
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from helpers.references import hooks_left, projection_of
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from lit_edit.files import load_tensors, read_metadata, save_tensors
from lit_edit.statistics import (
    GRADIENTS,
    KEY_COVARIANCES,
    KeyCovariance,
    Kind,
    Statistics,
    StatisticsError,
    collect_covariances,
    corpus_sha256,
)
from lit_edit.statistics.collect import sequences_of, spoken
from lit_edit.statistics.files import Partial

WORDS = "the capital of France is Paris and Maria was born in Oslo where snow falls all winter long".split()
each_kind = pytest.mark.parametrize("kind", [KEY_COVARIANCES, GRADIENTS], ids=lambda kind: kind.name)


def make_texts(number: int = 60) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 12, (number,), generator=generator).tolist()  # some have no token
    return [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator)) for n in lengths]


TEXTS = make_texts()


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return tiny_model("gpt2")


@pytest.fixture
def asked(loaded: tuple[Any, Any], tmp_path: Path) -> Callable[..., Statistics]:
    model, tokenizer = loaded

    def make(
        kind: Kind = KEY_COVARIANCES,
        layers: tuple[int, ...] = (1, 2),
        texts: Any = TEXTS,
        folder: str = "cache",
        **more: Any,
    ) -> Statistics:
        modules = {f"layer {i}": projection_of(model, i) for i in layers}
        return Statistics(kind, model, tokenizer, texts, "own", modules, tmp_path / folder, sequence_length=16, **more)

    return make


Asked = Callable[..., Statistics]


@pytest.fixture
def passes(loaded: tuple[Any, Any]) -> Iterator[list[int]]:
    found: list[int] = []
    handle = loaded[0].transformer.wte.register_forward_hook(lambda *_: found.append(1))
    yield found
    handle.remove()


# A file for each layer


@each_kind
def test_other_layers_use_what_is_there_and_collect_the_rest(kind: Kind, asked: Asked, passes: list[int]) -> None:
    reference = asked(kind, (0, 1, 2, 3), folder="elsewhere").get()
    first = asked(kind, (1, 2))
    assert first.missing() == ["layer 1", "layer 2"]
    first.get()
    before = len(passes)
    subset = asked(kind, (2,)).get()
    turned = asked(kind, (2, 1)).get()
    assert len(passes) == before
    assert list(turned) == ["layer 2", "layer 1"]
    wider = asked(kind, (3, 2, 0))
    assert wider.missing() == ["layer 3", "layer 0"]
    found = wider.get()
    assert len(passes) > before
    assert list(found) == ["layer 3", "layer 2", "layer 0"]
    for name, matrix in {**found, **turned, **subset}.items():
        torch.testing.assert_close(matrix, reference[name], rtol=0, atol=0)
    assert len(list(wider.folder.iterdir())) == 4


def test_the_header_says_what_was_used(asked: Asked) -> None:
    statistics = asked(max_tokens=300)
    statistics.get(batch_size=4)
    used = TEXTS
    while True:  # the texts up to the last of which a token counted
        shorter = asked(texts=used[:-1], folder="shorter", max_tokens=300)
        shorter.get(batch_size=4)
        if shorter.headers["layer 1"].n_tokens != 300:
            break
        used = used[:-1]
    header = statistics.headers["layer 1"]
    assert header.n_tokens == 300
    assert header.texts_sha256 == corpus_sha256(used)
    assert header.corpus_sha256 == corpus_sha256(TEXTS)
    again = asked(max_tokens=300)
    assert again.headers["layer 1"].texts_sha256 is None
    again.get()
    assert again.headers == statistics.headers


@dataclass
class Stream:
    """A corpus that is known by its identity, and counts what is read of it."""

    name: str
    identity: str
    read: int = 0

    def __iter__(self) -> Iterator[str]:
        for text in TEXTS:
            self.read += 1
            yield text


def test_a_stream_is_read_as_far_as_needed_and_not_at_all_for_a_file(asked: Asked) -> None:
    stream = Stream("stream", "a data set")
    found = asked(texts=stream, max_tokens=300).get()
    assert 0 < stream.read < len(TEXTS)
    torch.testing.assert_close(found, asked(folder="elsewhere", max_tokens=300).get(), rtol=0, atol=0)
    stream.read = 0
    again = asked(texts=stream, max_tokens=300)
    torch.testing.assert_close(again.get(), found, rtol=0, atol=0)
    assert again.headers["layer 1"].corpus == "stream"
    assert stream.read == 0
    assert asked(texts=Stream("stream", "its next version"), max_tokens=300).missing()


def test_what_may_not_be_collected_is_an_error_that_says_what_is_there(asked: Asked, passes: list[int]) -> None:
    with pytest.raises(StatisticsError) as caught:
        asked(max_tokens=500).get(may_collect=False)
    assert str(caught.value).startswith(
        "There are no covariances of layer 1, layer 2 over 500 tokens of the corpus 'own' in "
    )
    assert str(caught.value).endswith(
        "cache: collect them with `python train.py statistics` and the options of this run."
    )
    assert not passes
    asked(max_tokens=600).get()
    with pytest.raises(StatisticsError, match=r"something else\. max_tokens: found 600, expected 500\.$"):
        asked(max_tokens=500).get(may_collect=False)
    asked(max_tokens=600).get(may_collect=False)


def test_few_tokens_are_said_again_when_the_file_is_read(asked: Asked) -> None:
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"over 47 tokens, fewer than a key's 48 features in layer 1, layer 2: it"):
            asked(max_tokens=47).get()
        with pytest.warns(
            UserWarning, match=r"over 479 tokens, fewer than 10 for each of a key's 48 features in layer"
        ):
            asked(max_tokens=479, texts=TEXTS * 3).get()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            asked(max_tokens=480, texts=TEXTS * 3).get()
            asked(GRADIENTS, max_tokens=47).get()


# Cut, and gone on with


class Break(Exception):
    pass


@pytest.fixture
def window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many batches are sorted together; by itself more than these tests have texts for."""
    number: int = request.param
    monkeypatch.setattr("lit_edit.statistics.collect._WINDOW", number)
    return number


each_window = pytest.mark.parametrize("window", [1, 2], indirect=True)


def broken_after(number: int) -> Iterator[str]:
    yield from TEXTS[:number]
    raise Break


@each_kind
@each_window
def test_a_cut_collection_goes_on_to_the_last_bit(kind: Kind, asked: Asked, passes: list[int], window: int) -> None:
    whole = asked(kind, folder="whole").get(batch_size=4)
    everything = len(passes)
    passes.clear()

    class Cut(Stream):
        def __iter__(self) -> Iterator[str]:
            return broken_after(self.read)

    for number in (9, 9, 31):  # cut three times, once without having got any further
        with pytest.raises(Break):
            asked(kind, texts=Cut("stream", "same", number)).get(batch_size=4)
    statistics = asked(kind, texts=Stream("stream", "same"))
    assert [path.name for path in statistics.folder.iterdir()] == [statistics.partial().path.name]
    found = statistics.get(batch_size=4)
    torch.testing.assert_close(found, whole, rtol=0, atol=0)
    assert len(passes) == everything  # nothing was run twice
    assert len(list(statistics.folder.iterdir())) == 2
    assert statistics.headers["layer 1"].texts_sha256 == asked_hash(asked, kind)


def asked_hash(asked: Asked, kind: Kind) -> str | None:
    whole = asked(kind, folder="whole")
    whole.get()
    return whole.headers["layer 1"].texts_sha256


@each_kind
def test_sums_are_saved_after_so_many_tokens(kind: Kind, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = Partial.save
    monkeypatch.setattr(Partial, "save", lambda self, sums, at: (saved.append(at.tokens), save(self, sums, at)))
    asked(kind, folder="seldom", max_tokens=400).get(batch_size=2)
    assert saved == []
    statistics = asked(kind, max_tokens=400)
    statistics.get(batch_size=2, save_every=100)
    assert len(saved) == 3
    assert all(100 <= after - before < 150 for before, after in zip([0, *saved], saved, strict=False))
    assert not statistics.partial().path.exists()
    monkeypatch.setattr("lit_edit.statistics.collect._SAVE_SECONDS", 0.0)
    monkeypatch.setattr("lit_edit.statistics.collect._SAVE_SHARE", float("inf"))
    asked(kind, folder="by the clock", max_tokens=400).get(batch_size=2)
    assert len(saved) > 10
    with pytest.raises(ValueError, match="save_every must be at least 1, got 0"):
        asked(kind, max_tokens=399).get(save_every=0)


def interrupted(loaded: tuple[Any, Any], at: int, times: int) -> Any:
    """Ctrl-C in the middle of a pass, after the first layer's keys were counted and before the second's."""
    count = [0]

    def press(*_: object) -> None:
        count[0] += 1
        if count[0] == at:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    return loaded[0].transformer.h[2].register_forward_pre_hook(press)


@each_kind
@pytest.mark.parametrize("window", [1, 2, 16], indirect=True)
def test_ctrl_c_takes_effect_between_batches(kind: Kind, asked: Asked, loaded: tuple[Any, Any], window: int) -> None:
    whole = asked(kind, folder="whole").get(batch_size=4)
    handler = signal.getsignal(signal.SIGINT)
    handle = interrupted(loaded, at=3, times=1)
    with pytest.raises(KeyboardInterrupt):
        asked(kind).get(batch_size=4)
    handle.remove()
    assert signal.getsignal(signal.SIGINT) == handler
    assert hooks_left(loaded[0]) == 0
    statistics = asked(kind)
    position = json.loads(read_metadata(statistics.partial().path)["position"])
    lengths = [len(ids) for text in TEXTS for ids in sequences_of(loaded[1], text, 16)]
    windows = [lengths[i : i + 4 * window] for i in range(0, len(lengths), 4 * window)]
    taken = [n for one in windows for n in sorted(one, reverse=True)][:12]
    assert position["tokens"] == sum(taken)  # the third batch counts
    assert position["batches"] == 3 % window
    torch.testing.assert_close(statistics.get(batch_size=4), whole, rtol=0, atol=0)


@each_kind
def test_sequences_are_sorted_within_a_window_and_hardly_padded(
    kind: Kind, asked: Asked, loaded: tuple[Any, Any]
) -> None:
    shapes: list[tuple[int, ...]] = []
    handle = loaded[0].transformer.wte.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_edit.statistics.collect._WINDOW", 1)
        as_they_come = asked(kind, folder="as they come").get(batch_size=4)
        unsorted, shapes[:] = sum(rows * width for rows, width in shapes), []
        patch.setattr("lit_edit.statistics.collect._WINDOW", 3)
        found = asked(kind).get(batch_size=4)
    handle.remove()
    torch.testing.assert_close(found, as_they_come, rtol=1e-4, atol=1e-6)
    lengths = [len(ids) for text in TEXTS for ids in sequences_of(loaded[1], text, 16)]
    windows = [sorted(lengths[i : i + 12], reverse=True) for i in range(0, len(lengths), 12)]
    batches = [one[i : i + 4] for one in windows for i in range(0, len(one), 4)]
    assert shapes == [(len(batch), batch[0]) for batch in batches]
    assert sum(lengths) <= sum(rows * width for rows, width in shapes) < unsorted


@each_kind
@pytest.mark.parametrize("sizes", [(4, 8), (8, 4), (4, 3)])
@pytest.mark.parametrize("window", [2, 16], indirect=True)
def test_a_collection_goes_on_in_batches_of_another_size(
    kind: Kind, asked: Asked, loaded: tuple[Any, Any], sizes: tuple[int, int], window: int
) -> None:
    """The window that was begun is ended in the size it was begun in: nothing is counted twice, or left out."""
    whole = asked(kind, folder="whole")
    expected = whole.get(batch_size=5)
    handle = interrupted(loaded, at=3, times=1)
    with pytest.raises(KeyboardInterrupt):
        asked(kind).get(batch_size=sizes[0])
    handle.remove()
    again = asked(kind)
    torch.testing.assert_close(again.get(batch_size=sizes[1]), expected, rtol=1e-4, atol=1e-6)
    assert again.headers["layer 1"] == whole.headers["layer 1"]


@pytest.mark.parametrize("now", [TEXTS[1:], []], ids=["others", "none"])
def test_a_window_of_which_a_part_was_counted_must_be_the_same(
    asked: Asked, loaded: tuple[Any, Any], now: list[str]
) -> None:
    handle = interrupted(loaded, at=3, times=1)
    with pytest.raises(KeyboardInterrupt):
        asked(texts=Stream("stream", "same")).get(batch_size=4)
    handle.remove()

    class Other(Stream):
        def __iter__(self) -> Iterator[str]:
            return iter(now)

    with pytest.raises(
        StatisticsError, match=r"goes on with other texts than those .* delete .*partial-key_covariance-"
    ):
        asked(texts=Other("stream", "same")).get(batch_size=4)
    asked(texts=Stream("stream", "same")).get(batch_size=4)


def test_a_second_ctrl_c_takes_effect_at_once_and_keeps_what_was_saved(asked: Asked, loaded: tuple[Any, Any]) -> None:
    whole = asked(folder="whole").get(batch_size=4)
    handle = interrupted(loaded, at=3, times=2)
    with pytest.raises(KeyboardInterrupt):
        asked().get(batch_size=4, save_every=1)
    handle.remove()
    statistics = asked()
    position = json.loads(read_metadata(statistics.partial().path)["position"])
    assert position["texts_sha256"] == corpus_sha256(TEXTS[: position["texts"]])
    assert position["texts"] < 12  # two batches, not half of a third
    torch.testing.assert_close(statistics.get(batch_size=4), whole, rtol=0, atol=0)


def test_ctrl_c_while_files_are_written_loses_none(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_edit.statistics import kept

    save = kept.save

    def pressed(*what: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(kept, "save", save)
        save(*what)

    monkeypatch.setattr(kept, "save", pressed)
    with pytest.raises(KeyboardInterrupt):
        asked().get()
    assert asked().missing() == []


def test_a_thread_collects_as_well(asked: Asked) -> None:
    found: list[dict[str, Tensor]] = []
    thread = threading.Thread(target=lambda: found.append(asked().get()))
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0], asked(folder="elsewhere").get(), rtol=0, atol=0)


def cut(asked: Asked, identity: str = "same") -> Path:
    class Cut(Stream):
        def __iter__(self) -> Iterator[str]:
            return broken_after(20)

    statistics = asked(texts=Cut("stream", identity))
    with pytest.raises(Break):
        statistics.get(batch_size=4)
    return statistics.partial().path


@pytest.mark.parametrize("window", [1], indirect=True)
def test_a_stream_that_is_not_the_same_any_more_is_refused(asked: Asked, window: int) -> None:
    path = cut(asked)

    class Other(Stream):
        def __iter__(self) -> Iterator[str]:
            return iter(TEXTS[1:])

    with pytest.raises(
        StatisticsError, match=r"does not begin with the \d+ texts .*: delete .*partial-key_covariance-"
    ):
        asked(texts=Other("stream", "same")).get()
    path.unlink()
    asked(texts=Other("stream", "same")).get()


@pytest.mark.parametrize("window", [1], indirect=True)
def test_a_damaged_partial_file_is_an_error(asked: Asked, window: int) -> None:
    path = cut(asked)
    tensors, metadata = load_tensors(path)
    for change in ({"position": "{}x"}, {"position": '{"text": 3}'}, {"statistics": "{}"}):
        save_tensors(path, tensors, {**metadata, **change})
        with pytest.raises(StatisticsError, match=r"cannot be read: .* Delete the file"):
            asked(texts=Stream("stream", "same")).get()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StatisticsError, match=r"partial-.* cannot be read: .* Delete the file"):
        asked(texts=Stream("stream", "same")).get()


# What is said along the way


def test_a_long_collection_is_announced(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    asked(max_tokens=400).get(batch_size=2, notify=said.append)
    assert said == []
    clock = [0.0]

    def monotonic() -> float:
        clock[0] += 30
        return clock[0]

    monkeypatch.setattr("lit_edit.statistics.collect.time.monotonic", monotonic)
    asked(max_tokens=399).get(batch_size=2, notify=said.append)
    assert len(said) == 1
    assert said[0].startswith("Key covariance: 399 tokens at ")
    assert said[0].endswith(" to go.")


def test_times_in_words() -> None:
    assert [spoken(t) for t in (41, 720, 12_600)] == ["41 seconds", "12 minutes", "3.5 hours"]


# Precision


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_model_in_bfloat16_gives_nearly_what_it_gives_in_float32(family: str) -> None:
    model, tokenizer = tiny_model(family)
    modules = lambda: {f"layer {i}": projection_of(model, i) for i in (1, 2)}
    exact = collect_covariances(model, tokenizer, TEXTS * 2, modules(), sequence_length=16)
    model.bfloat16()
    rounded = collect_covariances(model, tokenizer, TEXTS * 2, modules(), sequence_length=16)
    for name, matrix in rounded.items():
        assert matrix.dtype == torch.float64
        error = (matrix - exact[name]).norm() / exact[name].norm()
        assert 0 < error < 0.02  # eight bits of mantissa
        torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=0)
        # Sums of rounded keys, not rounded sums: those would be on a grid of eight bits.
        assert not torch.equal(matrix, matrix.bfloat16().double())


# Several processes


def with_bos() -> tuple[Any, Any]:
    return tiny_model("llama")


def pieces(tokenizer: Any, texts: list[str], length: int) -> list[list[int]]:
    """The sequences of texts, by hand: BOS, which this tokenizer adds, at the start of each."""
    found = []
    for text in texts:
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        found += [[0, *own[i : i + length - 1]] for i in range(0, max(len(own), 1), length - 1)]
    return found


@pytest.mark.parametrize("length", [2, 5, 16, 400])
def test_a_long_text_is_several_sequences_each_with_what_the_tokenizer_adds(length: int) -> None:
    _, tokenizer = with_bos()
    for text in (*TEXTS[:9], " ".join(TEXTS)):
        assert sequences_of(tokenizer, text, length) == pieces(tokenizer, [text], length)
        tokenizer.truncation_side = "left"
        assert sequences_of(tokenizer, text, length) == pieces(tokenizer, [text], length)


def test_a_text_of_special_tokens_only_is_cut_as_any_other() -> None:
    def flagging_all(text: str, **_: Any) -> dict[str, list[int]]:  # those written out in the text, too
        return {"input_ids": [5] * len(text), "special_tokens_mask": [1] * len(text)}

    assert sequences_of(flagging_all, "abcde", 3) == [[5, 5, 5], [5, 5]]  # type: ignore[arg-type]


def test_what_stands_at_both_ends_stands_at_both_ends_of_each_sequence() -> None:
    _, tokenizer = with_bos()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    text = " ".join(TEXTS[:5])
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(own) > 20
    expected = [[0, *own[i : i + 4], 1] for i in range(0, len(own), 4)]
    assert sequences_of(tokenizer, text, 6) == expected
    assert sequences_of(tokenizer, "", 6) == [[0, 1]]
    with pytest.raises(StatisticsError, match="sequence_length is 2, and the tokenizer adds 2 tokens to each text"):
        sequences_of(tokenizer, text, 2)


@each_kind
@pytest.mark.parametrize("cut_after", [1, 2, 4])
@each_window
def test_a_collection_cut_within_a_text_goes_on_within_it(
    kind: Kind, cut_after: int, asked: Asked, window: int
) -> None:
    texts = [TEXTS[1], " ".join(TEXTS[:30]), "", " ".join(TEXTS[30:])]
    whole = asked(kind, folder="whole", texts=texts).get(batch_size=3)
    statistics = asked(kind, texts=texts)
    seen, save = [0], Partial.save

    def stop(self: Partial, sums: Any, position: Any) -> None:
        save(self, sums, position)
        seen[0] += 1
        if seen[0] == cut_after:
            assert position.sequences > 0 or position.batches  # in the middle of a text
            assert position.texts_sha256 == corpus_sha256(texts[: position.texts])
            raise Break

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Partial, "save", stop)
        with pytest.raises(Break):
            statistics.get(batch_size=3, save_every=1)
    again = asked(kind, texts=texts)
    torch.testing.assert_close(again.get(batch_size=3), whole, rtol=0, atol=0)
    ended = asked(kind, folder="whole", texts=texts)
    ended.get(may_collect=False)
    assert again.headers == ended.headers
    assert ended.headers["layer 1"].texts_sha256 == corpus_sha256(texts)


def shards(number: int, loaded: tuple[Any, Any]) -> list[KeyCovariance]:
    """The keys of layer 1 over every number-th sequence, a metric each."""
    model, tokenizer = loaded
    metrics = [KeyCovariance(48) for _ in range(number)]
    for i, ids in enumerate(ids for text in TEXTS for ids in sequences_of(tokenizer, text, 16)):
        seen: list[Tensor] = []
        handle = projection_of(model, 1).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        handle.remove()
        metrics[i % number].update(seen[0])
    return metrics


def test_shards_add_up_to_the_whole(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    modules: dict[str, nn.Module] = {"layer 1": projection_of(model, 1)}
    whole = collect_covariances(model, tokenizer, TEXTS, modules, sequence_length=16)["layer 1"]
    first, second, third = shards(3, loaded)
    for metric in (first, second, third):
        # As torch.distributed would gather: every process gets the states of all.
        metric.dist_sync_fn = lambda state, group, m=metric: [
            getattr(other, "gram" if state is m.gram else "count") for other in (first, second, third)
        ]
        metric.distributed_available_fn = lambda: True
    for metric in (first, second, third):
        torch.testing.assert_close(metric.compute(), whole, rtol=1e-4, atol=1e-7)
    halves = [
        collect_covariances(model, tokenizer, TEXTS[i::2], modules, sequence_length=16)["layer 1"] for i in (0, 1)
    ]
    counts = [sum(len(tokenizer(t)["input_ids"]) for t in TEXTS[i::2]) for i in (0, 1)]
    merged = sum(half * count for half, count in zip(halves, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(merged, whole, rtol=1e-4, atol=1e-7)


def collect_shared(rank: int, world: int, store: str, out: str) -> None:
    """What each of some processes does: its share of the batches, the files by the first of them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model, tokenizer = tiny_model("gpt2")
    modules: dict[str, nn.Module] = {f"layer {i}": projection_of(model, i) for i in (1, 2)}
    found: dict[str, Tensor] = {}
    # Many batches; and fewer than processes, so that one of them has nothing to run.
    for kind, most, size in ((KEY_COVARIANCES, 500, 2), (GRADIENTS, 500, 2), (KEY_COVARIANCES, 490, 1000)):
        asked = Statistics(
            kind, model, tokenizer, TEXTS, "own", modules, f"{out}-cache", sequence_length=16, max_tokens=most
        )
        passes = [0]
        handle = model.transformer.wte.register_forward_hook(lambda *_, p=passes: p.__setitem__(0, p[0] + 1))
        for name, matrix in asked.get(batch_size=size).items():
            found[f"{kind.name}, {most}, {name}"] = matrix
        handle.remove()
        found[f"passes, {kind.name}, {most}"] = torch.tensor(passes[0])
        assert not asked.missing()
    torch.save(found, f"{out}-{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The key covariance was counted over")
def test_two_processes_share_a_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    torch.multiprocessing.spawn(collect_shared, (2, str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    model, tokenizer = tiny_model("gpt2")
    modules: dict[str, nn.Module] = {f"layer {i}": projection_of(model, i) for i in (1, 2)}
    shares = [torch.load(tmp_path / f"out-{rank}", weights_only=True) for rank in (0, 1)]
    for kind, most, size in ((KEY_COVARIANCES, 500, 2), (GRADIENTS, 500, 2), (KEY_COVARIANCES, 490, 1000)):
        alone = Statistics(
            kind, model, tokenizer, TEXTS, "own", modules, tmp_path / "alone", sequence_length=16, max_tokens=most
        )
        kept = Statistics(
            kind, model, tokenizer, TEXTS, "own", modules, tmp_path / "out-cache", sequence_length=16, max_tokens=most
        )
        read = kept.get(may_collect=False)
        for name, matrix in alone.get(batch_size=size).items():
            torch.testing.assert_close(read[name], matrix, rtol=1e-10, atol=1e-12)
            for share in shares:
                torch.testing.assert_close(share[f"{kind.name}, {most}, {name}"], read[name], rtol=0, atol=0)
        assert kept.headers == alone.headers
        passes = [int(share[f"passes, {kind.name}, {most}"]) for share in shares]
        if size == 1000:
            assert passes == [1, 0]
        else:
            assert min(passes) > 5
            assert abs(passes[0] - passes[1]) <= 1
