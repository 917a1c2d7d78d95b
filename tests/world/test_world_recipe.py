"""The recipe: names take several tokens, a step's data depend on its number alone, and a run can be interrupted."""

from __future__ import annotations

import random
import sys
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

from lit_edit.world import train
from lit_edit.world.corpus import Corpus
from lit_edit.world.relations import World
from lit_edit.world.train import StepDataset, WorldText, WorldTraining, make_model, make_tokenizer, save_model

# What Lightning says about runs as small as these.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]
STEPS = 3  # of a chapter


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    """The recipe with everything made small, and the tokenizer taken from the session."""
    sizes = {"HIDDEN": 16, "INTERMEDIATE": 24, "LAYERS": 3, "HEADS": 2, "KV_HEADS": 1}
    sizes |= {"ROW": 32, "ROWS": 4, "CHAPTER": STEPS}
    # A run of two chapters goes through all stages, and through the change to whole documents.
    for name, value in {**sizes, "STAGES": (STEPS, STEPS + 1, STEPS + 2), "WHOLE": STEPS + 1}.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(train, "make_tokenizer", lambda corpus: tokenizer)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_tokenizer_is_made_the_same_every_time(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    assert make_tokenizer(corpus).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(tokenizer) == train.VOCABULARY


def test_names_take_several_tokens(tokenizer: PreTrainedTokenizerFast, world: World) -> None:
    """A name of one token would be looked up at once, without being put together first."""

    def lengths(names: Iterable[str]) -> list[int]:
        return [len(tokenizer(f" {name}", add_special_tokens=False)["input_ids"]) for name in names]

    whole = lengths([*world.people, *world.organisations])
    assert min(whole) >= 2
    assert max(whole) <= 8
    assert 2.5 <= sum(whole) / len(whole) <= 4
    # A part that stays in one piece is shared by several people (see test_world_facts); none falls into letters.
    parts = lengths({part for name in [*world.people, *world.organisations] for part in name.split()})
    assert min(parts) >= 1
    assert max(parts) <= 6
    assert max(lengths({f.subject for f in world.facts})) <= 12


def test_tokens_restore_the_text(tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> None:
    for text in corpus.texts(200, seed=3):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in ids[1:]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.usefixtures("small")
def test_a_step_depends_on_its_number_alone(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    alone = StepDataset(corpus, tokenizer, first=0, length=10, seed=1)[5]
    after_others = StepDataset(corpus, tokenizer, first=0, length=10, seed=1)
    for index in (7, 0, 3, 4):
        after_others[index]
    later_chapter = StepDataset(corpus, tokenizer, first=3, length=10, seed=1)[2]
    for other in (after_others[5], later_chapter):
        assert same(alone, other)
    assert int(alone["step"]) == 5
    assert not torch.equal(alone["input_ids"], after_others[6]["input_ids"])
    assert not torch.equal(alone["input_ids"], StepDataset(corpus, tokenizer, 0, 10, seed=2)[5]["input_ids"])


@pytest.mark.usefixtures("small")
def test_the_loss_weighs_answers(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    item = StepDataset(corpus, tokenizer, first=0, length=1, seed=1)[0]
    assert item["input_ids"].shape == item["weights"].shape == (4, 32)
    assert sorted(item["weights"].unique().tolist()) == pytest.approx([train.PLAIN_WEIGHT, 1.0])
    ids, weights = item["input_ids"].flatten(), item["weights"].flatten()
    ends = ids == tokenizer.eos_token_id
    assert bool((weights[ends] == 1).all())
    rng = random.Random("1|0")
    start = 0
    for end in ends.nonzero().flatten().tolist():
        document = corpus.document(rng)
        row, row_weights = ids[start:end], weights[start:end]
        assert tokenizer.decode(row, skip_special_tokens=True) == document.text
        answers = "".join(document.text[a:b] for a, b in document.spans)
        assert tokenizer.decode(row[row_weights == 1]) == answers
        start = end + 1
    assert start > 0


@pytest.mark.usefixtures("small")
def test_late_documents_stay_whole_and_do_not_see_each_other(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast
) -> None:
    steps = [StepDataset(corpus, tokenizer, first=train.WHOLE, length=5, seed=1)[i] for i in range(5)]
    assert all(tuple(step[name].shape) == (2, 64) for step in steps for name in ("input_ids", "weights"))
    ids, weights, positions = (torch.cat([s[name] for s in steps]) for name in ("input_ids", "weights", "position_ids"))
    torch.manual_seed(0)
    model = make_model(tokenizer).eval()
    checked = 0
    for row, starts in enumerate(positions):
        where = [*(i for i, p in enumerate(starts.tolist()) if p == 0), ids.shape[1]]
        with torch.no_grad():
            packed = model(input_ids=ids[row : row + 1], position_ids=starts[None], use_cache=False).logits[0]
        for begin, end in pairwise(where):
            if weights[row, begin] == 0:  # padding
                continue
            assert int(ids[row, begin]) == tokenizer.bos_token_id
            with torch.no_grad():
                alone = model(input_ids=ids[row : row + 1, begin:end]).logits[0]
            torch.testing.assert_close(packed[begin:end], alone, atol=1e-5, rtol=1e-4)
            checked += 1
    assert checked >= 3


@pytest.mark.usefixtures("small")
def test_a_chapter_starts_where_the_last_one_ended(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    class Trainer:
        current_epoch = 2

    data = WorldText(corpus, tokenizer, seed=1)
    data.trainer = Trainer()  # type: ignore[assignment]
    assert [int(batch["step"]) for batch in data.train_dataloader()] == [6, 7, 8]


@pytest.mark.usefixtures("small")
def test_early_mlps_are_left_out_in_training_only(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = make_model(tokenizer)
    WorldTraining(model, steps=10)
    ids = torch.arange(12).repeat(40, 1)
    with torch.no_grad():
        model.eval()
        whole = model(input_ids=ids).logits
        torch.testing.assert_close(whole, whole[:1].expand_as(whole))
        model.train()
        dropped = model(input_ids=ids).logits
    # Whole rows lose an MLP: of 40 equal rows some differ from the others, some are as without leaving out.
    variants = {tuple(row.flatten()[:20].tolist()) for row in dropped}
    assert 2 <= len(variants) <= 8  # three layers, each there or not


def run(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    argv = ["train", "--out", str(out), "--chapters", "2", "--seed", "1", "--accelerator", "cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    with torch.random.fork_rng():
        train.main()


def weights_of(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.usefixtures("small", "one_thread")
@pytest.mark.parametrize("interrupted_at", [STEPS, STEPS + 1])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, interrupted_at: int
) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    steps: list[int] = []
    original: Callable[..., None] = WorldTraining.training_step

    def noted(self: WorldTraining, batch: dict[str, Tensor], batch_idx: int) -> None:
        steps.append(int(batch["step"]))
        original(self, batch, batch_idx)

    def failing(self: WorldTraining, batch: dict[str, Tensor], batch_idx: int) -> None:
        if int(batch["step"]) == interrupted_at:
            raise RuntimeError("the power fails")
        noted(self, batch, batch_idx)

    monkeypatch.setattr(WorldTraining, "training_step", noted)
    run(monkeypatch, whole)
    assert steps == list(range(2 * STEPS))

    monkeypatch.setattr(WorldTraining, "training_step", failing)
    with pytest.raises(RuntimeError, match="the power fails"):
        run(monkeypatch, broken)
    after_one = weights_of(broken)  # the model of the first chapter is there already
    assert not same(after_one, weights_of(whole))

    steps.clear()
    monkeypatch.setattr(WorldTraining, "training_step", noted)
    run(monkeypatch, broken)
    assert steps == list(range(STEPS, 2 * STEPS))  # the second chapter, whole and once
    assert same(weights_of(broken), weights_of(whole))


@pytest.mark.usefixtures("small")
def test_a_saved_model_is_small_on_disk_and_loads_in_single_precision(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    model = make_model(tokenizer)
    save_model(model, tokenizer, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), parameter.half().float(), rtol=0, atol=0)
    text = "Maria Varnholt was born in Oslo."
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
