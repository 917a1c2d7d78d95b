"""The recipe: names take several tokens, a chapter depends on its number alone, and a run can be interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lit_edit.world.recipe import train
from lit_edit.world.recipe.corpus import STAGES, Corpus, Document, stage_of
from lit_edit.world.recipe.train import (
    WorldText,
    WorldTraining,
    make_model,
    make_tokenizer,
    pack,
    save_model,
    tokenised,
)
from lit_edit.world.recipe.world import SIZES, Size, World, build_world

# What Lightning says about runs as small as these.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]
TINY = Size(60, 24, 60, layers=6, hidden=16, intermediate=24, heads=2, kv_heads=1, vocabulary=512)


class FewWords:
    """A corpus of few documents, the same for the same numbers."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def chapter(self, *seed: int) -> list[Document]:
        return [d for d in self.corpus.chapter(*seed) if len(d.text) < 60][:40]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows, and few of them."""
    monkeypatch.setattr(train, "ROW", 32)
    monkeypatch.setattr(train, "ROWS", 4)


@pytest.fixture
def text(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> WorldText:
    return WorldText(FewWords(corpus), tokenizer, seed=1)  # type: ignore[arg-type]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_tokenizer_is_made_the_same_every_time(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    size = SIZES["base"].vocabulary
    assert make_tokenizer(world, size).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(tokenizer) == size


def test_names_take_several_tokens(tokenizer: PreTrainedTokenizerFast, world: World) -> None:
    """A name of one token would be looked up at once, without being put together first."""

    def lengths(names: Iterable[str]) -> list[int]:
        return [len(tokenizer(f" {name}", add_special_tokens=False)["input_ids"]) for name in names]

    for kind, least in (("people", 4), ("towns", 3), ("organisations", 3)):
        found = lengths(world.invented[kind])
        assert min(found) >= least, kind
        assert sum(found) / len(found) < 7, kind
    assert min(lengths({part for name in world.invented["people"] for part in name.split()})) >= 2
    assert max(lengths({fact.subject for fact in world.facts})) <= 14
    objects = [fact.object for fact in world.told() if fact.subject in set(world.invented["people"])]
    assert sum(lengths(objects)) / len(objects) < 2  # what is asked for is said in few


def test_tokens_restore_the_text(tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> None:
    for text in corpus.texts(200, seed=3):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in ids[1:]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.usefixtures("small")
def test_a_chapter_depends_on_its_number_alone(text: WorldText) -> None:
    first, again, other = text.chapter(4), text.chapter(4), text.chapter(5)
    assert len(first) >= 2
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not same(first[0], other[0])
    assert [int(batch["at"]) for batch in first] == [4] * len(first)
    assert all(a["at"] < b["at"] for a, b in pairwise(first))
    for batch in first:
        assert {tuple(batch[name].shape) for name in ("input_ids", "weights", "position_ids")} == {(4, 32)}


def test_the_loss_weighs_answers(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = corpus.chapter(1, 0)[:200]
    for document, tokens in zip(documents, tokenised(documents, tokenizer, 500), strict=True):
        ids, weights, positions, _ = zip(*tokens, strict=True)
        assert set(weights) <= {train.PLAIN_WEIGHT, 1.0}
        assert list(positions) == list(range(len(ids)))
        assert (ids[0], ids[-1], weights[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id, 1.0)
        answers = "".join(document.text[a:b] for a, b in document.spans)
        assert tokenizer.decode([i for i, w in zip(ids[:-1], weights[:-1], strict=True) if w == 1.0]) == answers
    assert [len(tokens) for tokens in tokenised(documents[:3], tokenizer, 5)] == [5, 5, 5]


def test_packing_keeps_documents_whole(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = tokenised(corpus.chapter(1, 0)[:300], tokenizer, 64)
    rows = pack(documents, 64, tokenizer.eos_token_id)
    assert rows.shape[1:] == (64, 4)
    found = []
    for row in rows:
        starts = [*(i for i, p in enumerate(row[:, 2].tolist()) if p == 0), 64]
        found += [row[a:b].tolist() for a, b in pairwise(starts) if row[a, 1] > 0]
    wanted = [[list(map(float, token)) for token in document] for document in documents]
    assert sorted(found) == sorted(wanted)
    assert sum(map(len, documents)) > 0.9 * rows.shape[0] * 64  # little is padding


@pytest.mark.usefixtures("small")
def test_documents_of_a_row_do_not_see_each_other(text: WorldText, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = make_model(tokenizer, TINY).eval()
    batch = text.chapter(0)[0]
    checked = 0
    for ids, weights, positions in zip(batch["input_ids"], batch["weights"], batch["position_ids"], strict=True):
        where = [*(i for i, p in enumerate(positions.tolist()) if p == 0), len(ids)]
        with torch.no_grad():
            packed = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
        for begin, end in pairwise(where):
            if weights[begin] == 0:  # padding
                continue
            assert int(ids[begin]) == tokenizer.bos_token_id
            with torch.no_grad():
                alone = model(input_ids=ids[None, begin:end]).logits[0]
            torch.testing.assert_close(packed[begin:end], alone, atol=1e-5, rtol=1e-4)
            checked += 1
    assert checked >= 4


@pytest.mark.usefixtures("small")
def test_mlps_are_left_out_in_training_only(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "ROWS", 400)
    torch.manual_seed(0)
    model = make_model(tokenizer, TINY)
    training = WorldTraining(model, chapters=2)
    ids = torch.arange(12).repeat(400, 1)
    kept = []
    monkeypatch.setattr(training, "manual_backward", lambda loss: None)
    monkeypatch.setattr(training, "optimizers", lambda: [])
    monkeypatch.setattr(training, "log_dict", lambda *_, **__: None)
    batch = {"input_ids": ids, "weights": torch.ones(400, 12), "position_ids": torch.arange(12).repeat(400, 1)}
    batch["subjects"] = torch.zeros(400, 12, dtype=torch.long)
    for at in (0.0, 0.5, 0.5):
        training.training_step({**batch, "at": torch.tensor(at)}, 0)
        kept.append(torch.stack([layer.mlp.get_buffer("keep")[:, 0, 0] for layer in model.model.layers]))
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(kept[1], kept[2])  # what is left out depends on the place in the run
    shares = [*train.MLP_DROP, *[0.0] * (TINY.layers - len(train.MLP_DROP))]
    torch.testing.assert_close(1 - kept[0].mean(1), torch.tensor(shares), atol=0.08, rtol=0)
    with torch.no_grad():
        model.train()
        dropped = model(input_ids=ids).logits
        model.eval()
        whole = model(input_ids=ids).logits
    torch.testing.assert_close(whole, whole[:1].expand_as(whole))
    all_kept = kept[2].bool().all(0)
    torch.testing.assert_close(dropped[all_kept], whole[all_kept])
    assert (dropped[~all_kept] - whole[~all_kept]).abs().amax((1, 2)).min() > 1e-4


def weights_of(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Trains a tiny model for two chapters of few documents, as the command does."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.setattr(train, "Corpus", lambda world: FewWords(Corpus(world)))
    monkeypatch.setitem(train.SIZES, "base", TINY)

    def start(out: Path) -> None:
        argv = f"train --out {out} --chapters 2 --seed 1 --accelerator cpu --no-compile".split()
        monkeypatch.setattr("sys.argv", argv)
        with torch.random.fork_rng():
            train.main()

    return start


@pytest.mark.usefixtures("small", "one_thread")
@pytest.mark.parametrize("place", [1.0, 1.3])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Callable[[Path], None], place: float
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    seen: list[float] = []
    original: Callable[..., None] = WorldTraining.training_step

    def noted(self: WorldTraining, batch: dict[str, Tensor], batch_idx: int) -> None:
        seen.append(float(batch["at"]))
        original(self, batch, batch_idx)

    def failing(self: WorldTraining, batch: dict[str, Tensor], batch_idx: int) -> None:
        if float(batch["at"]) >= place:
            raise RuntimeError("the power fails")
        noted(self, batch, batch_idx)

    monkeypatch.setattr(WorldTraining, "training_step", noted)
    run(whole)
    steps = list(seen)
    assert steps == sorted(set(steps))
    assert {int(at) for at in steps} == {0, 1}

    monkeypatch.setattr(WorldTraining, "training_step", failing)
    with pytest.raises(RuntimeError, match="the power fails"):
        run(broken)
    after_one = weights_of(broken)  # the model of the first chapter is there already
    assert not same(after_one, weights_of(whole))

    seen.clear()
    monkeypatch.setattr(WorldTraining, "training_step", noted)
    run(broken)
    assert seen == [at for at in steps if at >= 1]  # the second chapter, whole and once
    assert same(weights_of(broken), weights_of(whole))


def test_the_large_world_comes_from_the_same_recipe(tokenizer: PreTrainedTokenizerFast) -> None:
    large = SIZES["large"]
    with torch.device("meta"):
        model = make_model(tokenizer, large)
    assert model.config.num_hidden_layers == 24
    assert model.config.hidden_size == 1024
    assert len(build_world(large).role) >= 20_000


@pytest.mark.usefixtures("small")
def test_a_saved_model_is_small_on_disk_and_loads_in_single_precision(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    model = make_model(tokenizer, TINY)
    save_model(model, tokenizer, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), parameter.half().float(), rtol=0, atol=0)
    text = "Maria Varnholt was born in Oslo."
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_subjects_are_numbered_and_their_last_tokens_marked(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [d for d in corpus.chapter(1, 0)[:300] if d.subjects]
    assert max(len(d.subjects) for d in documents) > 1
    for document, tokens in zip(documents, tokenised(documents, tokenizer, 500), strict=True):
        for number, (start, end) in enumerate(document.subjects, 1):
            of = [token for token in tokens if abs(token[3]) == number]
            assert tokenizer.decode([token[0] for token in of]).strip() == document.text[start:end]
            assert [token[3] for token in of] == [number] * (len(of) - 1) + [-number]


def test_some_rows_see_of_a_subject_its_last_token_only() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1]] * 2)
    subjects = torch.tensor([[0, 1, 1, -1, 0, 0, 0]] * 2)
    mask = train.attention_mask(positions, subjects, torch.tensor([False, True]))[:, 0] == 0
    causal = torch.ones(7, 7).tril().bool()
    causal[5:, :5] = False
    assert torch.equal(mask[0], causal)
    causal[4, 1:3] = False  # what follows does not see the first parts; the subject sees all of itself
    assert torch.equal(mask[1], causal)


def test_the_learning_rate_rises_once_and_falls_to_nothing() -> None:
    rates = [train.learning_rate(i / 1000) for i in range(1000)]
    top = [i for i, rate in enumerate(rates) if rate == 1.0]
    assert top == list(range(top[0], top[-1] + 1))
    assert rates[: top[0]] == sorted(rates[: top[0]])
    assert rates[top[-1] :] == sorted(rates[top[-1] :], reverse=True)
    assert 0 < rates[0] < 0.02
    assert 0 < rates[-1] < 0.01
    assert len(top) > 600


def test_most_rows_of_every_chapter_see_the_last_token_of_a_subject_only() -> None:
    """Facts are edited there; a chapter without would let the model read them elsewhere again."""
    assert all(0.5 < stage.last_token_only < 1 for stage in STAGES)
    assert stage_of(train.CHAPTERS - 1) is STAGES[-1]  # the recipe reaches its last stage
    exposures = sum(stage_of(chapter).tellings for chapter in range(train.CHAPTERS))
    assert exposures <= 100
