"""What measurements see, and what a run keeps: figures of a pruned copy, folders of its own, facts written twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import data, quick_editor, trainer, write_corpus
from helpers.sessions import locate
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from lit_edit.callbacks import EditLog, EveryNEdits
from torch import Tensor

from lit_edit import LitEdit
from lit_edit.cli import EditCLI
from lit_edit.editors.restraints import PRUNE
from lit_edit.editors.solvers import ROME
from lit_edit.runs.results import ResultsLogger

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The key covariance was counted over"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]
Folder = Callable[[str], Path]


class Weights(EveryNEdits):
    """The edited weights as a measurement sees them."""

    def __init__(self, finished: bool = True) -> None:
        super().__init__(every_n=2)
        self.as_if_finished = finished
        self.seen: dict[int, dict[str, Tensor]] = {}

    def measure(self, trainer: Any, pl_module: Any, edits: int) -> dict[str, float]:
        self.seen[edits] = {name: weight.clone() for name, weight in pl_module.edited_parameters().items()}
        return {}


def made(folder: Path, tmp_path: Path, prune: bool) -> LitEdit:
    restraints: list[Any] = [PRUNE(form="linear", beta=1.5)] if prune else []
    editor = locate(ROME(covariance=False), restraints=restraints)
    return LitEdit(editor, str(folder), corpus=str(write_corpus(tmp_path)))


def test_prune_is_measured_on_a_copy_at_every_count(tiny_folder: Folder, tmp_path: Path) -> None:
    """Its paper prunes a copy each time: the run goes on from what was not pruned."""
    folder = tiny_folder("llama")
    seen: dict[str, Any] = {}
    for name, prune, finished in (("plain", False, True), ("pruned", True, True), ("as they are", True, False)):
        watch = Weights(finished)
        trainer(tmp_path, watch).fit(made(folder, tmp_path, prune), datamodule=data(tmp_path, 5))
        seen[name] = watch.seen
    torch.testing.assert_close(seen["as they are"][4], seen["plain"][4], rtol=0, atol=0)
    assert any(not torch.equal(w, seen["plain"][4][name]) for name, w in seen["pruned"][4].items())
    short = Weights()
    trainer(tmp_path, short).fit(made(folder, tmp_path, True), datamodule=data(tmp_path, 4))
    torch.testing.assert_close(seen["pruned"][4], short.seen[4], rtol=0, atol=0)  # as if the run had ended there


def test_a_run_keeps_its_journal_edit_by_edit(tiny_folder: Folder, tmp_path: Path) -> None:
    lines: list[int] = []

    class Look(EveryNEdits):
        def measure(self, trainer: Any, pl_module: LightningModule, edits: int) -> dict[str, float]:
            path = tmp_path / "edits.jsonl"
            lines.append(path.read_text().count("\n") if path.is_file() else 0)
            return {}

    module = LitEdit(quick_editor("memit"), str(tiny_folder("llama")), corpus=str(write_corpus(tmp_path)))
    trainer(tmp_path, EditLog("1MB"), Look(every_n=1), logger=ResultsLogger(tmp_path)).fit(
        module, datamodule=data(tmp_path, 3)
    )
    assert lines == [0, 1, 2, 3]
    assert module.session is not None
    assert module.session.updates.limit == 1_000_000
    assert len(list((tmp_path / "updates").iterdir())) >= 3
    assert [json.loads(line)["number"] for line in (tmp_path / "edits.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_keeping_edits_needs_a_module_that_makes_some(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="EditLog keeps edits; BoringModel makes none"):
        trainer(tmp_path, EditLog(), logger=ResultsLogger(tmp_path)).fit(BoringModel())


def test_facts_that_are_written_a_second_time_are_said(tiny_folder: Folder, tmp_path: Path) -> None:
    module = LitEdit(quick_editor("memit"), str(tiny_folder("llama")), corpus=str(write_corpus(tmp_path)))
    trainer(tmp_path).fit(module, datamodule=data(tmp_path, 2))
    with pytest.warns(UserWarning, match=r"2 of the facts are in the weights already \(case 'c0' first\)"):
        trainer(tmp_path).fit(module, datamodule=data(tmp_path, 2))


def test_runs_that_start_together_have_folders_of_their_own(tmp_path: Path) -> None:
    class Asked(EditCLI):
        def __init__(self) -> None:
            self.resumed, self._made, self.config_init = None, [], {}

        def _get(self, config: Any, key: str, default: Any = None) -> Any:
            return default

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: Asked()._folder(tmp_path / "rome"), range(64)))
    assert len(set(found)) == 64
    assert {path.name for path in found} == {f"version_{i}" for i in range(64)}
