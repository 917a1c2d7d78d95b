"""The callback that leaves a page, in a real run of edits and in modules that have nothing to do with editing."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import data, quick_editor, trainer, write_corpus
from lightning.pytorch import Callback
from lit_edit.callbacks import EveryNEdits, ExportModel, MatrixStability, Report, ResultsTable, Retention

from lit_edit import LitEdit
from lit_edit.cli import EditCLI
from lit_edit.runs.report import write_report
from lit_edit.runs.results import ResultsLogger, read_results
from lit_edit.runs.spectra import write_spectra

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
]


def page_in(folder: Path) -> dict[str, Any]:
    html = (folder / "report.html").read_text(encoding="utf-8")
    found = re.search(r'id="data">([^<]*)<', html)
    assert found
    return json.loads(gzip.decompress(base64.b64decode(found[1])))  # type: ignore[no-any-return]


class Halves(EveryNEdits):
    def measure(self, trainer, pl_module, edits):
        return {"halves": edits / 2}


class Cut(Callback):
    """Ends a run before a batch."""

    def __init__(self, batch, error=RuntimeError):
        self.batch, self.error = batch, error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            raise self.error("cut")


def test_any_module_leaves_a_page_of_its_figures(regression, make_trainer, vector_loader, tmp_path):
    callbacks = [Halves(every_n=2), Report()]
    make_trainer(*callbacks, logger=ResultsLogger(tmp_path)).fit(regression, vector_loader(16))
    (run,) = page_in(tmp_path)["runs"]
    assert run["curves"] == {"halves": [[0, 0.0, None, None], [2, 1.0, None, None], [4, 2.0, None, None]]}
    assert run["outcomes"] == []


def test_it_can_be_switched_off_or_go_elsewhere(editor, make_trainer, edit_loader, tmp_path):
    make_trainer(Halves(every_n=2), Report(enabled=False), logger=ResultsLogger(tmp_path / "a")).fit(
        editor, edit_loader(2, 1)
    )
    assert not list(tmp_path.rglob("*.html"))
    there = tmp_path / "there" / "page.html"
    make_trainer(Halves(every_n=2), Report(path=str(there)), logger=ResultsLogger(tmp_path / "b")).fit(
        editor, edit_loader(2, 1)
    )
    assert list(tmp_path.rglob("*.html")) == [there]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_is_cut_leaves_a_page(editor, make_trainer, edit_loader, tmp_path, error):
    made = make_trainer(Halves(every_n=2), Report(), Cut(3, error), logger=ResultsLogger(tmp_path))
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        made.fit(editor, edit_loader(5, 1))
    (run,) = page_in(tmp_path)["runs"]
    assert [point[0] for point in run["curves"]["halves"]] == [0, 2]
    assert run["missing"][0] == "The run ended early, after 2 edits."


def test_a_run_without_an_edit_leaves_none(editor, make_trainer, edit_loader, tmp_path):
    with pytest.raises(RuntimeError, match="cut"):
        make_trainer(Halves(every_n=2), Report(), Cut(0), logger=ResultsLogger(tmp_path)).fit(editor, edit_loader(2, 1))
    assert not (tmp_path / "report.html").exists()


def test_what_ended_a_run_is_raised_even_if_there_can_be_no_page(editor, make_trainer, edit_loader, tmp_path):
    (tmp_path / "file").touch()
    report = Report(path=str(tmp_path / "file" / "page.html"))  # below a file
    made = make_trainer(Halves(every_n=1), report, Cut(2), logger=ResultsLogger(tmp_path / "run"))
    with pytest.warns(UserWarning, match="The report was not written"), pytest.raises(RuntimeError, match="cut"):
        made.fit(editor, edit_loader(5, 1))


def test_a_page_that_cannot_be_made_does_not_lose_the_run(editor, make_trainer, edit_loader, tmp_path, monkeypatch):
    """Whatever goes wrong in it: the run ends as usual, and the warning has the traceback and the way to repeat it."""

    def broken(*_: Any) -> None:
        raise KeyError("a column nobody knows")

    monkeypatch.setattr("lit_edit.callbacks.report.write_report", broken)
    made = make_trainer(Halves(every_n=2), Report(), logger=ResultsLogger(tmp_path))
    with pytest.warns(UserWarning, match="The report was not written") as caught:
        made.fit(editor, edit_loader(4, 1))
    (said,) = [str(w.message) for w in caught if "report" in str(w.message)]
    assert f"`lit-edit report {tmp_path}`" in said
    assert "KeyError: 'a column nobody knows'" in said
    assert [record["edits"] for record in read_results(tmp_path).records] == [0, 2, 4]
    monkeypatch.undo()
    write_report([tmp_path], tmp_path / "report.html")  # what the warning says
    assert page_in(tmp_path)["runs"][0]["made"] == 4


def test_spectra_before_and_after_reach_the_page(editor, make_trainer, edit_loader, tmp_path):
    """The module adds an identity per edit to an identity of width 2."""
    make_trainer(MatrixStability(every_n=2), Report(), logger=ResultsLogger(tmp_path)).fit(editor, edit_loader(4, 1))
    expected = {"before": [[1, 1.0], [2, 1.0]], "after": [[1, 5.0], [2, 5.0]]}
    assert page_in(tmp_path)["runs"][0]["spectra"] == {"matrix": expected}


def test_spectra_of_weights_that_diverged_have_gaps(tmp_path):
    write_spectra(tmp_path / "spectra.json", {"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([math.nan, math.inf])})
    content = json.loads((tmp_path / "spectra.json").read_text(encoding="utf-8"))
    assert content == {"w": {"before": [3.0, 1.0], "after": [None, None]}}


def test_without_a_results_logger_it_only_warns(editor, make_trainer, edit_loader, tmp_path):
    with pytest.warns(UserWarning, match="Report found no ResultsLogger"):
        make_trainer(Report()).fit(editor, edit_loader(2, 1))
    assert not list(tmp_path.rglob("*.html"))


def test_a_run_of_edits_leaves_its_requests_and_answers(tiny_folder, tmp_path):
    module = LitEdit(quick_editor("memit"), str(tiny_folder("gpt2")), corpus=str(write_corpus(tmp_path)))
    logger = ResultsLogger(tmp_path / "log")
    callbacks = [Retention(every_n=2), ExportModel(model=False), ResultsTable(), Report()]
    trainer(tmp_path, *callbacks, logger=logger).fit(module, datamodule=data(tmp_path, 3))
    page = page_in(tmp_path / "log")
    (run,) = page["runs"]
    lines = (tmp_path / "log" / "outcomes.jsonl").read_text(encoding="utf-8").splitlines()
    last = [line for line in map(json.loads, lines) if line["edits"] == 3]
    texts = page["texts"]
    assert [texts[row[6]] for row in run["outcomes"]] == [line["answer"] for line in last]
    assert [texts[page["cases"][row[0]][0]] for row in run["outcomes"]] == ["c0", "c1", "c2"]
    assert [row[17] for row in run["outcomes"]] == [edit.steps for edit in module.journal]
    assert run["seconds"].keys() >= {"values", "solve"}
    assert run["missing"] == ["config.yaml is missing: the settings are unknown, but for what results.json says."]


def test_the_command_line_writes_it_last(tiny_folder, tmp_path, monkeypatch):
    cli = EditCLI(
        [
            *("fit", "--config", "memit.yaml", "--model.model", str(tiny_folder("gpt2"))),
            *("--model.corpus", str(write_corpus(tmp_path)), "--data", "FactsDataModule"),
            *("--data.path", str(data(tmp_path, 2).path), "--data.n_edits=null", "--downstream.n_items=0"),
            *("--model.editor.layers.init_args.layers=[1,2]", "--model.editor.values.init_args.steps=2"),
            *("--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator=cpu"),
            "--trainer.enable_progress_bar=false",
        ]
    )
    assert [type(callback) for callback in cli.trainer.callbacks][-2:] == [ResultsTable, Report]
    page = page_in(tmp_path / "memit" / "version_0")
    (run,) = page["runs"]
    assert run["missing"] == []
    assert run["about"]["machine"].endswith(f"computed on cpu, {run['about']['machine'].split(', ')[-1]}")
    assert run["settings"]["model.editor.solver"] == "MEMIT"
    assert run["verdict"].startswith(("0 of 2", "1 of 2", "2 of 2"))
