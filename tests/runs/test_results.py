from __future__ import annotations

import json
import math
import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch.utils.data import DataLoader

from lit_edit.runs.results import ResultsError, ResultsLogger, read_results, results_table


def logged(directory: Path, *evaluations: tuple[int, dict[str, float]]) -> ResultsLogger:
    logger = ResultsLogger(directory)
    for step, metrics in evaluations:
        logger.log_metrics(metrics, step=step)
    return logger


def test_one_record_per_step_complete_after_every_call(tmp_path):
    logger = ResultsLogger(tmp_path / "new" / "run")
    logger.log_metrics({"reliability": 0.0}, step=0)
    assert read_results(logger.path).records == [{"edits": 0, "reliability": 0.0}]
    logger.log_metrics({"locality": torch.tensor(1.0), "count": 3}, step=0)
    logger.log_metrics({"reliability": 0.5}, step=25)
    logger.log_metrics({"generalization": 0.25})
    assert read_results(tmp_path / "new" / "run").records == [
        {"edits": 0, "reliability": 0.0, "locality": 1.0, "count": 3},
        {"edits": 25, "reliability": 0.5, "generalization": 0.25},
    ]
    assert os.listdir(logger.directory) == ["results.json"]


def test_the_file_is_strict_json(tmp_path):
    logged(tmp_path, (0, {"a": math.nan, "b": -math.inf, "c": torch.tensor(math.inf), "d": 1.5}))

    def refuse(word: str) -> None:
        raise AssertionError(word)

    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert list(content) == ["run", "records"]
    assert content["records"] == [{"edits": 0, "a": None, "b": None, "c": None, "d": 1.5}]


def test_a_metric_that_is_no_number_is_named(tmp_path):
    with pytest.raises(TypeError, match="metric 'answer' should be a number"):
        logged(tmp_path, (0, {"answer": "yes"}))  # type: ignore[dict-item]


def test_only_evaluations_are_recorded(tmp_path):
    logger = logged(tmp_path, (0, {"loss": 1.0, "epoch": 0}), (1, {"train/loss": 1.0}))
    assert logger.records == []
    assert not logger.path.exists()
    logger.log_metrics({"train/loss": 1.0, "reliability": 1.0}, step=2)
    assert logger.records == [{"edits": 2, "reliability": 1.0}]


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
def test_what_lightning_logs_by_itself_stays_out(tmp_path):
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"method": "mose", "rank": 4})
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch).mean()
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("validation_loss", self.layer(batch).mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def trainer(**kwargs) -> Trainer:
        return Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=ResultsLogger(tmp_path),
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            **kwargs,
        )

    module, data = Module(), DataLoader(torch.ones(3, 2))  # type: ignore[arg-type]
    trainer().fit(module, data, data)
    assert read_results(tmp_path).records == []
    assert read_results(tmp_path).run["method"] == "mose"
    assert (tmp_path / "checkpoints").is_dir()  # Lightning's default place, beside the results

    logged(tmp_path, (0, {"reliability": 0.0}), (3, {"reliability": 1.0}))
    before = read_results(tmp_path)
    trainer(enable_checkpointing=False).validate(module, data, verbose=False)
    assert read_results(tmp_path) == before


class TestResume:
    FIRST = ((0, {"a": 0.0}), (25, {"a": 1.0, "b": 1.0}), (50, {"a": 2.0}), (75, {"a": 3.0}))

    def test_later_records_are_dropped_and_the_same_step_is_replaced(self, tmp_path):
        logged(tmp_path, *self.FIRST)
        logged(tmp_path, (50, {"a": 20.0}))
        assert read_results(tmp_path).records == [
            {"edits": 0, "a": 0.0},
            {"edits": 25, "a": 1.0, "b": 1.0},
            {"edits": 50, "a": 20.0},
        ]

    def test_other_figures_of_the_same_step_stay(self, tmp_path):
        logged(tmp_path, *self.FIRST)
        logged(tmp_path, (25, {"a": 9.0}))
        assert read_results(tmp_path).records[-1] == {"edits": 25, "a": 9.0, "b": 1.0}

    def test_step_zero_starts_a_new_run(self, tmp_path):
        old = ResultsLogger(tmp_path)
        old.log_run({"method": "rome", "seconds": 3.0, "note": "old"})
        old.log_metrics({"a": 1.0}, step=25)
        new = ResultsLogger(tmp_path)
        new.log_run({"method": "memit"})
        assert read_results(tmp_path).run["method"] == "rome"  # not touched before the new run has measured
        new.log_metrics({"b": 0.0}, step=0)
        found = read_results(tmp_path)
        assert found.records == [{"edits": 0, "b": 0.0}]
        assert found.run["method"] == "memit"
        assert not {"seconds", "note"} & set(found.run)

    def test_the_run_record_is_taken_over(self, tmp_path):
        old = ResultsLogger(tmp_path)
        old.log_run({"method": "rome", "seconds": 3.0})
        old.log_metrics({"a": 1.0}, step=25)
        new = logged(tmp_path, (50, {"a": 2.0}))
        assert new.run["seconds"] == 3.0
        assert read_results(tmp_path).run["method"] == "rome"

    def test_going_back_within_one_process(self, tmp_path):
        logger = logged(tmp_path, *self.FIRST, (25, {"a": 7.0}))
        assert [record["edits"] for record in logger.records] == [0, 25]
        logger.log_metrics({"a": 0.0}, step=0)
        assert logger.records == [{"edits": 0, "a": 0.0}]

    def test_a_file_of_another_kind_is_not_overwritten(self, tmp_path):
        (tmp_path / "results.json").write_text("[1, 2]")
        with pytest.raises(ResultsError, match=r"results\.json is not a results file"):
            logged(tmp_path, (25, {"a": 1.0}))
        ResultsLogger(tmp_path).finalize("success")
        assert (tmp_path / "results.json").read_text() == "[1, 2]"


def test_the_run_record(tmp_path):
    logger = ResultsLogger(tmp_path)
    logger.log_hyperparams(Namespace(method="mose", model=Path("models/own"), _hidden=1))
    logger.log_hyperparams({"seed": 7, "rate": math.inf, "layers": (3, 4), "nested": {"dtype": torch.float32}})
    logger.finalize("success")
    run = read_results(tmp_path).run
    assert run["versions"]["torch"] == torch.__version__
    del run["versions"]
    assert run == {
        "method": "mose",
        "model": str(Path("models/own")),
        "seed": 7,
        "rate": None,
        "layers": [3, 4],
        "nested": {"dtype": "torch.float32"},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a results file"),
        ('{"records": []}', "is not a results file"),
        ('{"run": {}, "records": {}}', "field 'records'"),
        ('{"run": {}, "records": [{"edits": 0}, {"reliability": 1}]}', "record 2, field 'edits'"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ResultsError, match=rf"other\.json.*{message}"):
        read_results(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_results(tmp_path)


class TestTable:
    RECORDS = (
        {
            "edits": 0,
            "reliability": 0.0,
            "locality": 1.0,
            "downstream/sst2": 0.9,
            "stability/worst_condition_number": 12.3456,
            "stability/transformer.h.5.mlp.down_proj.weight/condition_number": 12.3456,
        },
        {"edits": 500, "reliability": 0.5, "locality": None},
        {
            "edits": 1000,
            "reliability": 0.875,
            "interval/reliability/low": 0.85,
            "interval/reliability/high": 0.9,
            "count/reliability": 1000,
            "immediate/reliability": 0.75,
            "locality": None,
            "downstream/sst2": 0.85,
            "stability/worst_condition_number": 1234567.0,
            "stability/mean_relative_drift": 0.0123,
            "something_else": 3.0,
        },
    )

    def rows(self, records) -> list[list[str]]:
        console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        with console.file:
            console.print(results_table(records))
        lines = console.export_text().splitlines()
        assert max(len(line) for line in lines) <= 80
        return [line.split() for line in lines if line.strip()]

    def test_before_after_change(self):
        title, heading, _, *rows = self.rows(self.RECORDS)
        assert " ".join(title) == "Results after 1,000 edits"
        assert " ".join(heading) == "figure before after 95 % interval change"
        assert [" ".join(row) for row in rows] == [
            "reliability 0 0.875 0.85 to 0.9 +0.875",
            "locality 1 n/a -",
            "immediate/reliability 0.75 0.75 -",
            "downstream/sst2 0.9 0.85 -0.05",
            "stability/worst_condition_ 12.3 1,234,567 +1,234,555",
            "number",  # long names are folded
            "stability/mean_relative_dr 0.0123 0.0123 -",
            "ift",
        ]

    def test_no_record(self):
        with pytest.raises(ValueError, match="no record"):
            results_table([])
