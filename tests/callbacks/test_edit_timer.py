"""Seconds by stage, by a clock that the parts of a step move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import data, quick_editor, trainer, write_corpus
from lightning.pytorch import Callback
from lit_edit.callbacks import EditTimer, EveryNEdits, ResultsTable

from lit_edit import LitEdit
from lit_edit.runs.results import ResultsLogger, read_results

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),
]


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Slow(EveryNEdits):
    """Another callback, whose measurements take long."""

    def __init__(self, clock: Clock, name: str) -> None:
        super().__init__(every_n=1)
        self.clock, self.name = clock, name

    @property
    def state_key(self) -> str:
        return self.name

    def measure(self, trainer: Any, pl_module: Any, edits: int) -> dict[str, float]:
        self.clock.now += 1000
        return {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("lit_edit.callbacks.edit_timer.time", clock)
    return clock


def test_stages_of_ordinary_training(clock, regression, make_trainer, vector_loader, tmp_path, monkeypatch):
    step, optimise = regression.training_step, torch.optim.SGD.step

    def forward(batch: Any, batch_idx: int) -> Any:
        clock.now += 1 + batch_idx
        return step(batch, batch_idx)

    def backward(loss: Any) -> None:
        clock.now += 20
        loss.backward()

    def end(outputs: Any, batch: Any, batch_idx: int) -> None:
        clock.now += 300

    def optimised(self: Any, closure: Any = None) -> Any:
        found = optimise(self, closure)
        clock.now += 4000
        return found

    monkeypatch.setattr(regression, "training_step", forward)
    monkeypatch.setattr(regression, "backward", backward)
    monkeypatch.setattr(regression, "on_train_batch_end", end)
    monkeypatch.setattr(torch.optim.SGD, "step", optimised)
    logger = ResultsLogger(tmp_path)
    make_trainer(Slow(clock, "a"), EditTimer(every_n=2), Slow(clock, "b"), logger=logger).fit(
        regression, vector_loader(20)
    )
    wanted = {"seconds/backward": 20, "seconds/batch end": 300, "seconds/step": 4000}
    found = {record["edits"]: record for record in read_results(tmp_path).records}
    for edits, mean in ((2, 1.5), (4, 3.5), (5, 5)):
        assert found[edits] == {"edits": edits, "seconds/forward": mean, "seconds/total": 4320 + mean, **wanted}
    means = read_results(tmp_path).run["seconds_per_edit"]
    assert means == {"forward": 3, "backward": 20, "step": 4000, "batch end": 300, "total": 4323}


def test_an_editing_module_without_a_journal(clock, editor, make_trainer, edit_loader, tmp_path, monkeypatch):
    write = editor.on_train_batch_end

    def end(outputs: Any, batch: Any, batch_idx: int) -> None:
        write(outputs, batch, batch_idx)
        clock.now += 7

    monkeypatch.setattr(editor, "on_train_batch_end", end)
    logger = ResultsLogger(tmp_path)
    make_trainer(EditTimer(every_n=4), logger=logger).fit(editor, edit_loader(6, 2))
    assert read_results(tmp_path).run["seconds_per_edit"] == {"forward": 0, "batch end": 3.5, "total": 3.5}


def test_an_editing_run_says_its_own_stages(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    module = LitEdit(
        quick_editor("rome", contexts=False), str(tiny_folder("llama")), corpus=str(write_corpus(tmp_path))
    )
    logger = ResultsLogger(tmp_path / "run")
    watching: list[Callback] = [EditTimer(every_n=2), ResultsTable()]
    trainer(tmp_path, *watching, logger=logger).fit(module, datamodule=data(tmp_path, 3))
    (two, three) = read_results(tmp_path / "run").records
    for record, edits in ((two, module.journal[:2]), (three, [module.journal[2]])):  # type: ignore[index]
        assert record["seconds/values"] == pytest.approx(sum(e.stages["values"] for e in edits) / len(edits))
        assert record["seconds/total"] == pytest.approx(sum(e.seconds for e in edits) / len(edits))
    said = read_results(tmp_path / "run").run["seconds_per_edit"]
    assert said == {stage: round(s, 6) for stage, s in module.journal.seconds_by_stage().items()}
