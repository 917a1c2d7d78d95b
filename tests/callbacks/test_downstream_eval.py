"""General-ability tasks during an editing run, and during a fine-tuning that has nothing to do with editing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import SENTENCES, data, quick_editor, taught, trainer, write_corpus
from lightning.pytorch import LightningModule
from lit_edit.callbacks import DownstreamEval
from torch.utils.data import DataLoader

from lit_edit import LitEdit, load_model
from lit_edit.evaluation.downstream import Task, TaskFileError, run_task
from lit_edit.model.prompts import Prompter
from lit_edit.requests import RequestError
from lit_edit.runs.results import ResultsLogger, read_results

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]

Folder = Callable[[str], Path]
CAPITALS = [("The capital of Peru is", "Lima."), ("The capital of France is", "Lyon.")]
RIVERS = [("The river of Peru runs slowly to the", "sea."), ("The river of Peru", "is dry")]


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    content = {
        name: [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
        for name, pairs in (("capitals", CAPITALS), ("rivers", RIVERS))
    }
    (tmp_path / "tasks.json").write_text(json.dumps(content))
    return str(tmp_path / "tasks.json")


class FineTuning(LightningModule):
    """Ordinary training on a few sentences; knows nothing of this project."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def training_step(self, batch: list[str], batch_idx: int) -> torch.Tensor:
        (text,) = batch
        ids = torch.tensor([[*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id]])
        loss: torch.Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def test_it_follows_a_fine_tuning(tiny_folder: Folder, tmp_path: Path, tasks: str) -> None:
    """The same weights with the callback and without it, and figures that rise as the sentences are learnt."""
    modules = [FineTuning(*load_model(str(tiny_folder("llama")))) for _ in range(2)]
    modules[0].train()
    modules[1].train()
    callback = DownstreamEval(tasks, every_n=100)
    loader = DataLoader(list(SENTENCES) * 50, batch_size=1)  # type: ignore[arg-type, var-annotated]
    trainer(tmp_path, callback, logger=ResultsLogger(tmp_path)).fit(modules[0], loader)
    trainer(tmp_path).fit(modules[1], loader)
    records = read_results(tmp_path).records
    assert [r["edits"] for r in records] == [0, 100, 200, 250]
    assert (records[0]["downstream/capitals"], records[-1]["downstream/capitals"]) == (0, 1)
    assert records[-1]["downstream/rivers"] == 0.5
    assert modules[0].model.training
    torch.testing.assert_close(dict(modules[0].state_dict()), dict(modules[1].state_dict()), rtol=0, atol=0)


def test_it_scores_the_weights_after_exactly_n_edits(tiny_folder: Folder, tmp_path: Path, tasks: str) -> None:
    module = LitEdit(quick_editor("memit"), *taught(tiny_folder("llama")), corpus=str(write_corpus(tmp_path)))
    prompter = Prompter(module.tokenizer, 128)

    def scores() -> dict[str, float]:
        return {
            f"downstream/{name}": run_task(module.model, prompter, Task(name, *map(list, zip(*pairs, strict=True))))[0]  # type: ignore[arg-type]
            for name, pairs in (("capitals", CAPITALS), ("rivers", RIVERS))
        }

    before = scores()
    assert before == {"downstream/capitals": 1.0, "downstream/rivers": 0.5}
    callback = DownstreamEval(tasks, every_n=2)
    trainer(tmp_path, callback, logger=ResultsLogger(tmp_path)).fit(module, datamodule=data(tmp_path, 3))
    records = {r.pop("edits"): r for r in read_results(tmp_path).records}
    assert list(records) == [0, 2, 3]
    assert records[0] == before
    assert records[3] == scores() == callback.latest


def test_which_tasks_and_how_many_items(tasks: str) -> None:
    assert [(t.name, len(t.prompts)) for t in DownstreamEval(tasks, ["rivers"], n_items=1).tasks] == [("rivers", 1)]
    assert [len(t.prompts) for t in DownstreamEval(tasks, n_items=None).tasks] == [2, 2]
    assert len(DownstreamEval().tasks[0].prompts) == 100  # the embedded file
    assert DownstreamEval("nowhere.json", n_items=0).tasks == []


def test_what_is_refused(tasks: str, tmp_path: Path) -> None:
    with pytest.raises(TaskFileError, match="has no task 'lakes'; it has capitals, rivers"):
        DownstreamEval(tasks, ["lakes"])
    with pytest.raises(ValueError, match="n_items should not be negative, it is -1"):
        DownstreamEval(tasks, n_items=-1)

    class Bare(LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> None: ...

    with pytest.raises(TypeError, match="DownstreamEval needs `model` and `tokenizer` in Bare"):
        trainer(tmp_path, DownstreamEval(tasks)).fit(Bare(), DataLoader([1]))  # type: ignore[arg-type]


def test_switched_off_it_asks_nothing_of_the_module(tmp_path: Path) -> None:
    class Bare(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.layer(batch.float()[:, None]).sum()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer(tmp_path, DownstreamEval(n_items=0), logger=ResultsLogger(tmp_path)).fit(Bare(), DataLoader([1]))  # type: ignore[arg-type]
    assert read_results(tmp_path).records == []


class Watched(LightningModule):
    """One step of nothing on a language model."""

    automatic_optimization = False

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def training_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> None: ...


def test_tasks_at_chance_are_named_once(
    tiny_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "nli": [{"prompt": f"{i} is even. True or False?", "answer": str(i % 2 == 0)} for i in range(30)],
        "few": [{"prompt": "The river", "answer": "runs"}],
    }
    (tmp_path / "tasks.json").write_text(json.dumps(rows))
    module = Watched(*load_model(str(tiny_folder("llama"))))
    callback = DownstreamEval(str(tmp_path / "tasks.json"), every_n=1)
    trainer(tmp_path, callback, logger=ResultsLogger(tmp_path)).fit(module, DataLoader([1, 2]))  # type: ignore[arg-type]
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "No better than chance before the first edit: nli (0.00, chance 0.50). What edits break does not show there; "
        "name other tasks with --downstream.tasks, or leave all out with --downstream=null."
    ]
    about = read_results(tmp_path).run["downstream"]
    assert about == {
        "nli": {"items": 30, "chance": 0.5, "known": False},
        "few": {"items": 1, "chance": 1.0, "known": True},
    }


def test_items_too_long_for_the_model(tiny_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"own": [{"prompt": "The river " * n, "answer": "runs"} for n in (1, 200, 2)]}
    (tmp_path / "tasks.json").write_text(json.dumps(rows))
    module = Watched(*load_model(str(tiny_folder("llama"))))
    with pytest.raises(RequestError, match=r"task 'own', item 1.*--downstream\.skip_long=true leaves such items out"):
        trainer(tmp_path, DownstreamEval(str(tmp_path / "tasks.json"))).fit(module, DataLoader([1]))  # type: ignore[arg-type]
    callback = DownstreamEval(str(tmp_path / "tasks.json"), skip_long=True)
    trainer(tmp_path, callback).fit(module, DataLoader([1]))  # type: ignore[arg-type]
    assert "Task own: 1 item too long for the model, 2 are left." in capsys.readouterr().out
    assert [len(task.prompts) for task in callback.tasks] == [2]
    rows["own"] = rows["own"][1:2]
    (tmp_path / "tasks.json").write_text(json.dumps(rows))
    callback = DownstreamEval(str(tmp_path / "tasks.json"), skip_long=True)
    with pytest.raises(RequestError, match="All items of the task 'own' are too long"):
        trainer(tmp_path, callback).fit(module, DataLoader([1]))  # type: ignore[arg-type]
