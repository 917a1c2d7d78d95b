"""Retention, checkpoints and export in real editing runs, and what they say where they do not fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import assert_same_weights, data, facts, quick_editor, taught, trainer, write_corpus, write_facts
from lightning.pytorch import LightningModule, Trainer
from lit_edit.callbacks import EditCheckpoint, EditLog, EveryNEdits, ExportModel, MatrixStability, Retention
from lit_edit.datamodules import FactsDataModule
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_edit import LitEdit, Reference, evaluate
from lit_edit.evaluation.evaluate import figures
from lit_edit.evaluation.scope import EditedFacts
from lit_edit.model.prompts import Prompter
from lit_edit.runs.results import ResultsLogger, read_results

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]

Folder = Callable[[str], Path]
FIGURES = ("reliability", "generalization", "locality")


@pytest.fixture
def module(tiny_folder: Folder, tmp_path: Path) -> LitEdit:
    """On a model that has something to forget."""
    return LitEdit(quick_editor("rome"), *taught(tiny_folder("llama")), corpus=str(write_corpus(tmp_path)))


class Own(EveryNEdits):
    """Scores by `evaluate` itself, with a reference taken before the fit."""

    def __init__(self, module: LitEdit, asked: list[Any], every_n: int) -> None:
        super().__init__(every_n)
        self.asked, self.reference, self.found = asked, Reference(), dict[int, dict[str, float]]()
        self.reference.collect(module.model, Prompter(module.tokenizer, 128), asked)

    def measure(self, trainer: Trainer, pl_module: Any, edits: int) -> dict[str, float]:
        asked = self.asked[:edits] if edits else self.asked
        facts = EditedFacts(asked[:edits])
        prompter = Prompter(pl_module.tokenizer, 128)
        self.found[edits] = figures(evaluate(pl_module.model, prompter, asked, self.reference, edited=facts))
        return {}


def test_it_scores_the_edits_so_far_and_all_at_the_baseline(module: LitEdit, tmp_path: Path) -> None:
    requests = data(tmp_path, 5)
    requests.setup()
    own = Own(module, requests.requests, every_n=2)
    fitting = trainer(tmp_path, Retention(every_n=2), own, logger=ResultsLogger(tmp_path / "log"))
    fitting.fit(module, datamodule=requests)
    found = {r["edits"]: {k: v for k, v in r.items() if k != "edits"} for r in read_results(tmp_path / "log").records}
    assert found == own.found
    assert list(found) == [0, 2, 4, 5]
    assert all(set(FIGURES) == {n for n in figures if "/" not in n} for figures in found.values())
    assert found[0]["locality"] == 1
    assert found[5]["locality"] < 1


def test_references_are_taken_without_dropout(tiny_folder: Folder, tmp_path: Path) -> None:
    """Somebody left the model in training mode, and GPT-2 has dropout: `fit` finds it so before the module's hooks."""
    model, tokenizer = taught(tiny_folder("gpt2"))
    quiet = LitEdit(quick_editor("memit"), model, tokenizer, corpus=str(write_corpus(tmp_path)))
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.9
    quiet.train()
    retention = Retention()
    trainer(tmp_path, retention, logger=ResultsLogger(tmp_path)).fit(quiet, datamodule=data(tmp_path, 3))
    assert read_results(tmp_path).records[0]["locality"] == 1


def test_a_second_fit_says_what_its_new_probes_are_compared_with(module: LitEdit, tmp_path: Path) -> None:
    retention = Retention()
    trainer(tmp_path, retention).fit(module, datamodule=data(tmp_path, 2))
    more = FactsDataModule(str(write_facts(tmp_path, 4)), offset=2)
    with pytest.warns(UserWarning, match="compares 4 questions with the model as it is after 2 edits"):
        trainer(tmp_path, retention).fit(module, datamodule=more)
    assert len(module.edited_requests) == 4
    assert {name for name in retention.latest if "/" not in name} == set(FIGURES)


def test_saved_references_count_more_than_those_of_the_resumed_model() -> None:
    """It may have been given as an edited one; what the checkpoint does not know stays."""
    resumed = Retention()
    resumed._reference.answers = {"known": [1], "new": [2]}
    saved = {"last_measured": 3, "at_once": {"reliability": [1.0]}}
    resumed.load_state_dict({**saved, "reference": {"known": [9]}})
    assert resumed.state_dict() == {**saved, "reference": {"known": [9], "new": [2]}}


def test_it_needs_a_module_that_edits(tmp_path: Path) -> None:
    class Plain(LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> None: ...

    with pytest.raises(TypeError, match="Retention evaluates edits; Plain makes none"):
        trainer(tmp_path, Retention()).fit(Plain(), datamodule=data(tmp_path, 1))


def test_it_needs_the_requests(module: LitEdit, tmp_path: Path) -> None:
    requests = data(tmp_path, 1)
    with pytest.raises(TypeError, match="needs a data module that offers `requests`"):
        trainer(tmp_path, Retention()).fit(module, train_dataloaders=requests.train_dataloader())


def test_checkpoints_are_made_every_n_edits_and_at_the_end(
    module: LitEdit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[tuple[int, Path]] = []
    save = Trainer.save_checkpoint

    def spy(self: Trainer, filepath: Path, *args: Any, **kwargs: Any) -> None:
        save(self, filepath, *args, **kwargs)
        saved.append((module.edits_applied, filepath))

    monkeypatch.setattr(Trainer, "save_checkpoint", spy)
    trainer(tmp_path, EditCheckpoint(every_n=2)).fit(module, datamodule=data(tmp_path, 5))
    path = tmp_path / "checkpoints" / "edits.ckpt"
    assert saved == [(2, path), (4, path), (5, path)]
    assert [p.name for p in path.parent.iterdir()] == ["edits.ckpt"]
    content = torch.load(path, weights_only=True)
    assert len(content["lit_edit"]["journal"]["edits"]) == 5
    # A resumed run need not save again what it has just read.
    assert content["callbacks"]["EditCheckpoint"] == {"last_measured": 5}


def test_the_export_is_the_edited_model(module: LitEdit, tmp_path: Path) -> None:
    fitting = trainer(tmp_path, ExportModel(str(tmp_path / "out")), logger=ResultsLogger(tmp_path / "log"))
    fitting.fit(module, datamodule=data(tmp_path, 2))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(plain, module.model)
    text = "The capital of France is"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == module.tokenizer(text)["input_ids"]
    lines = (tmp_path / "log" / "edits.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [asdict(e) for e in module.journal]
    assert [json.loads(line)["target_new"] for line in lines] == [f["target_new"] for f in facts(2)]


def test_every_process_asks_for_the_folder_as_often(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Trainer.log_dir` is broadcast: a process that asks for it alone waits for the others for ever."""
    asked: dict[bool, list[str]] = {}
    found = Trainer.log_dir.fget
    for first in (True, False):
        calls = asked[first] = list[str]()

        def spy(self: Trainer, calls: list[str] = calls) -> str | None:
            calls.append(sys._getframe(1).f_code.co_filename)
            return str(found(self))  # type: ignore[misc]

        monkeypatch.setattr(Trainer, "log_dir", property(spy))
        monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self, first=first: first))
        module = LitEdit(quick_editor("rome"), str(tiny_folder("llama")), corpus=str(write_corpus(tmp_path)))
        watching = Retention(2), MatrixStability(every_n=2), EditCheckpoint(every_n=2), EditLog(), ExportModel()
        trainer(tmp_path, *watching).fit(module, datamodule=data(tmp_path, 3))
    assert asked[True] == asked[False]
    assert {Path(name).stem for name in asked[True]} >= {"every_n", "export", "checkpoint", "edit_log"}
