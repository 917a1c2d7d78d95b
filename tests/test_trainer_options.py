"""`--trainer.*` with `fit`: every setting works, or is refused in one line that says what to take instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.models import REPOSITORY
from helpers.runs import command_line
from lit_edit.configs.find import read_config

from lit_edit import load_editor
from lit_edit.cli import EditCLI, main
from lit_edit.commands.suitable import check_strangers
from lit_edit.runs.results import read_results
from lit_edit.statistics.corpora import load_corpus

Folder = Callable[[str], Path]
Said = pytest.CaptureFixture[str]


@pytest.fixture
def arguments(tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    monkeypatch.chdir(tmp_path)
    return lambda n=2: command_line(tiny_folder("llama"), tmp_path / ".", "memit", n)


Command = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("precision=bf16-mixed", "the precision of the model's weights is --model.dtype=bfloat16."),
        ("precision=16-true", "--model.dtype=float16."),
        ("precision=64", "--model.dtype=float32."),
        ("devices=2", "2 processes: edits follow from one another and are made by one, --trainer.devices=1."),
        ("max_epochs=2", "--trainer.max_epochs=2: every fact is written once; --data.n_edits says how many."),
        ("max_steps=5", "--data.n_edits says how many"),
        ("gradient_clip_val=1", "--model.editor.values.constraint bounds a change"),
        ("accumulate_grad_batches=2", "--data.batch_size says how many facts go together"),
    ],
)
def test_what_editing_cannot_honour_is_refused(
    arguments: Command, tmp_path: Path, capsys: Said, given: str, said: str
) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    command = arguments()
    capsys.readouterr()  # what saving the model says
    assert main([*command, f"--trainer.{given}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert {path.name for path in tmp_path.iterdir()} - before == {"facts.json", "corpus.txt"}


def test_fast_dev_run_edits_once_and_writes_nothing(arguments: Command, tmp_path: Path, capsys: Said) -> None:
    cli = EditCLI([*arguments(), "--trainer.fast_dev_run=true", "--trainer.logger=true"])
    assert cli.model.edits_applied == 1
    assert "fast_dev_run: 1 edit made, nothing written." in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"facts.json", "corpus.txt"}


def test_a_run_without_tensorboard_has_its_own_folder_all_the_same(arguments: Command, tmp_path: Path) -> None:
    for number in (0, 1):  # the second does not write over the first
        assert main([*arguments(), "--trainer.logger=false"]) == 0
        run = tmp_path / "memit" / f"version_{number}"
        assert (run / "checkpoints" / "edits.ckpt").is_file()
        assert (run / "config.yaml").is_file()
        assert [record["edits"] for record in read_results(run).records] == [0, 2]
        assert not list(run.glob("events*"))
    assert {path.name for path in tmp_path.iterdir()} == {"facts.json", "corpus.txt", "memit"}


def test_a_csv_logger_has_the_figures_and_the_run_stays_whole(arguments: Command, tmp_path: Path) -> None:
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'csv'}"]
    assert main([*arguments(), *logger]) == 0
    (table,) = (tmp_path / "csv").rglob("metrics.csv")
    header, *rows = table.read_text(encoding="utf-8").splitlines()
    assert {"reliability", "locality", "step", "train/p_target"} <= set(header.split(","))
    at = header.split(",").index("reliability")
    step = header.split(",").index("step")
    asked = {row.split(",")[step]: row.split(",")[at] for row in rows if row.split(",")[at]}
    records = read_results(tmp_path / "memit" / "version_0").records
    assert {int(count): float(value) for count, value in asked.items()} == {
        record["edits"]: record["reliability"] for record in records
    }


def test_early_stopping_on_a_figure_of_ours(arguments: Command, tmp_path: Path, capsys: Said) -> None:
    """A tiny model learns nothing: with a patience of one the run ends after its first edit, saved as any other."""
    stop = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=reliability"]
    stop += ["--trainer.callbacks.mode=max", "--trainer.callbacks.patience=1"]
    cli = EditCLI([*arguments(4), *stop, "--retention.every_n=1"])
    assert cli.model.edits_applied == 1
    run = tmp_path / "memit" / "version_0"
    assert [record["edits"] for record in read_results(run).records] == [0, 1]
    assert f"ask --run {run}" in capsys.readouterr().out.replace("\n", "")


def test_a_strangers_model_is_not_edited_with_the_toy_worlds_facts(
    arguments: Command, tmp_path: Path, capsys: Said
) -> None:
    command = arguments()
    at = command.index("--data")
    del command[at : at + 5]
    assert main([*command, "--data.n_edits=2"]) == 2
    assert "would be edited with facts of the embedded model's invented world" in capsys.readouterr().err


def test_what_a_strangers_model_takes_over_is_said() -> None:
    data = {"class_path": "lit_edit.datamodules.FactsDataModule", "init_args": {"path": "facts.csv"}}
    editor = {"init_args": {"layers": {"class_path": "FixedLayers", "init_args": {"layers": [2, 3]}}}}
    model = {"model": "gpt2", "corpus": "embedded", "editor": editor}
    config = {"model": model, "data": data, "downstream": {"path": None, "n_items": 50}}
    said = check_strangers(config, ["--config", "memit.yaml"])
    assert said.startswith("Note: 'gpt2' takes over what was made for the embedded model: the text for key covariances")
    assert "(--downstream.tasks; --downstream=null leaves them out) and layers [2, 3] (--model.editor" in said
    named = ["--config", "memit.yaml", "--config", "models/gpt2-xl/memit.yaml"]
    assert "layers" not in check_strangers(config, named)
    assert "layers" not in check_strangers(config, ["--model.editor.layers.layers=[2,3]"])
    own = {**config, "model": {**model, "corpus": "texts.txt"}, "downstream": {"n_items": 0}}
    assert check_strangers(own, named) == ""
    assert check_strangers({**config, "model": {**model, "model": "embedded"}, "data": {}}, []) == ""


def test_overlays_of_real_models_name_a_real_corpus() -> None:
    for path in (REPOSITORY / "configs" / "models").rglob("*.yaml"):
        model = read_config(str(path))["model"]
        wants = path.parent.name == "models" or load_editor(path.stem).needs_covariances
        assert ("corpus" in model) == wants, path
        assert not wants or load_corpus(model["corpus"]).name == "hf:wikimedia/wikipedia:20231101.en:train:text"
