"""The command line: configurations by name, overrides, what a run leaves behind, and errors in one line.

Settings inside nested classes are given by their path without ``init_args``: ``--model.editor.layers.layers=[1,2]``,
``--model.editor.values.steps=3``, ``--data.n_edits=5``. A class is changed by its short name where it is one of
`lit_edit`'s (``--model.editor.solver=ROME``); settings that both classes have stay as they were, so that ``--data
FactsDataModule`` after a configuration with ``n_edits: 100`` wants ``--data.n_edits=null`` for all of a file's facts.
"""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.models import tiny_tokenizer
from helpers.runs import PLACES, command_line, quick_editor, write_facts
from lit_edit.callbacks import DownstreamEval
from lit_edit.datamodules import FactsDataModule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BloomConfig

from lit_edit import EditRequest, edit, load_editor, load_model
from lit_edit.cli import EditCLI, _take_back, _Unstarted, main
from lit_edit.editors.layers import FixedLayers
from lit_edit.editors.solvers import ROME
from lit_edit.evaluation.scores import score_targets
from lit_edit.model.families import Family
from lit_edit.model.prompts import Prompter
from lit_edit.requests import RequestError
from lit_edit.runs.results import read_results

Folder = Callable[[str], Path]
Errors = pytest.CaptureFixture[str]

REPOSITORY = Path(__file__).resolve().parent.parent
FAMILIES = ("gpt2", "llama", "qwen2")


@pytest.fixture
def arguments(tiny_folder: Folder, tmp_path: Path) -> Callable[..., list[str]]:
    """A complete command line for a method on a tiny model, runs in ``tmp_path``."""

    def command(method: str = "memit", family: str = "llama", n: int = 3, **changes: Any) -> list[str]:
        return command_line(tiny_folder(family), tmp_path, method, n, **changes)

    return command


Command = Callable[..., list[str]]


def records(run: Path) -> list[dict[str, Any]]:
    return read_results(run).records


def edits(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "edits.jsonl").read_text(encoding="utf-8").splitlines()]


# What a run leaves behind


def test_a_run_by_name_from_another_working_directory(arguments: Command, tmp_path: Path) -> None:
    """As a user starts it: nothing but the result on standard error, and everything in ``runs/mose/version_0``."""
    command = arguments("mose")
    at = command.index("--trainer.default_root_dir")
    del command[at : at + 2]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "mose" / "version_0"
    model, page = done.stderr.splitlines()
    assert model.startswith("Edited model: runs/mose/version_0/model")
    assert page == "Report: runs/mose/version_0/report.html"
    assert "Results after 3 edits" in done.stdout
    assert {p.name.split(".")[0] for p in run.iterdir()} == {
        *("checkpoints", "config", "edits", "events", "hparams", "model", "outcomes", "report", "results", "spectra"),
        "updates",
    }
    assert [e["case_id"] for e in edits(run)] == ["c0", "c1", "c2"]


def test_what_is_written(arguments: Command, tmp_path: Path, capsys: Errors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    assert main(arguments()) == 0
    run = tmp_path / "memit" / "version_0"

    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert set(results) == {"run", "records"}
    about = results["run"]
    assert (about["name"], about["method"], about["data"]) == ("memit", "MEMIT", "FactsDataModule")
    assert about["data_path"] == str(tmp_path / "facts.json")
    assert (about["seed"], about["batch_size"], about["device"]) == (0, 1, "cpu")
    assert about["seconds"] > about["seconds_per_edit"]["total"] > about["seconds_per_edit"]["values"] > 0
    assert about["threads"] == torch.get_num_threads() == 1
    assert {"torch", "lightning", "transformers", "lit-edit"} <= set(about["versions"])
    assert [r["edits"] for r in results["records"]] == [0, 3]
    for record in results["records"]:
        assert {"reliability", "generalization", "locality", "stability/worst_condition_number"} <= set(record)
        assert all(value is None or isinstance(value, (int, float)) for value in record.values())
    assert results["records"][0]["locality"] == 1

    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["path"] == about["data_path"]
    (events,) = run.glob("events*")
    board = EventAccumulator(str(events))
    board.Reload()
    assert [e.step for e in board.Scalars("locality")] == [0, 3]
    journal = edits(run)
    assert [(e["number"], e["subject"], e["target_new"]) for e in journal] == [
        (i + 1, *place) for i, place in enumerate(PLACES[:3])
    ]

    out = capsys.readouterr().out
    assert "CPU threads: 1, by the size of the model" in out
    table = out[out.index("Results after 3 edits") :]
    row = next(line for line in table.splitlines() if "locality" in line)
    assert row.split()[1] == "1"


def test_the_end_line_names_what_there_is(arguments: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    for given in ([], ["--trainer.logger=false", "--export.model=false"]):
        with caplog.at_level(logging.INFO, logger.name):
            logger.addHandler(caplog.handler)
            try:
                assert main([*arguments(n=1), *given]) == 0
            finally:
                logger.removeHandler(caplog.handler)
        said = next(r.getMessage() for r in reversed(caplog.records) if "edits: " in r.getMessage())
        places = [Path(words.split(": ", 1)[1]) for words in said.split("   ")]
        assert all(place.exists() for place in places)
        assert "results: " in said


def test_a_run_without_an_edit_leaves_nothing_behind(arguments: Command, tmp_path: Path, capsys: Errors) -> None:
    root = ["--trainer.default_root_dir", str(tmp_path / "new" / "runs")]
    command = [*arguments(n=2, target_new=""), *root]
    assert main(command) == 2
    assert not (tmp_path / "new").exists()
    write_facts(tmp_path, 2)
    cut = ["--trust=helpers", "--trainer.callbacks", "helpers.runs.PowerCut", "--trainer.callbacks.batch"]
    with pytest.raises(RuntimeError, match="power cut"):
        main([*command, *cut, "0"])  # the unedited model's answers are on file by then
    assert not (tmp_path / "new").exists()
    with pytest.raises(RuntimeError, match="power cut"):
        main([*command, *cut, "1"])
    assert (tmp_path / "new" / "runs" / "memit" / "version_0" / "results.json").is_file()
    with pytest.raises(RuntimeError, match="power cut"):
        main([*command, *cut, "0"])
    assert [place.name for place in (tmp_path / "new" / "runs" / "memit").iterdir()] == ["version_0"]


def test_what_somebody_else_put_into_the_folder_stays(tmp_path: Path) -> None:
    inner, outer = tmp_path / "a" / "b", tmp_path / "a"
    inner.mkdir(parents=True)
    (inner / "config.yaml").touch()
    (inner / "notes.txt").touch()
    _take_back([inner, outer])
    assert [path.name for path in inner.iterdir()] == ["notes.txt"]
    (inner / "notes.txt").unlink()
    (outer / "config.yaml").touch()  # only the run's own folder is emptied
    _take_back([inner, outer])
    assert [path.name for path in outer.iterdir()] == ["config.yaml"]


def test_the_saved_configuration_runs_again(arguments: Command, tmp_path: Path) -> None:
    assert main(arguments()) == 0
    first = tmp_path / "memit" / "version_0"
    assert main(["fit", "--config", str(first / "config.yaml")]) == 0
    again = tmp_path / "memit" / "version_1"
    assert records(again) == records(first)


@pytest.mark.parametrize(("method", "family"), [("mose", "qwen2"), ("memit", "gpt2"), ("rome", "llama")])
def test_the_exported_model_is_the_edited_one(arguments: Command, tmp_path: Path, method: str, family: str) -> None:
    """And loads without this project; the journal says what it gives."""
    cli = EditCLI(arguments(method, family))
    run = tmp_path / method / "version_0"
    journal = edits(run)
    assert len(journal) == 3
    assert all(layer_change > 0 for e in journal for layer_change in e["change"].values())

    plain = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    prompter = Prompter(tokenizer, 128)
    rows = [prompter.row(e["prompt"], e["target_new"]) for e in journal]
    ids = torch.tensor([rows[0].ids])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, cli.model.model(ids).logits, rtol=0, atol=0)
    # The journal says what the last edit gave on the final weights.
    assert score_targets(plain, prompter, rows).log_prob.exp()[-1].item() == pytest.approx(
        journal[-1]["p_target"], rel=1e-4
    )


# Overrides


def test_counts_to_measure_at(arguments: Command, tmp_path: Path) -> None:
    given = ["--retention.every_n=[1,3]", "--stability.every_n", "[2]", "--export.model=false"]
    assert main([*arguments(n=4), *given]) == 0
    run = tmp_path / "memit" / "version_0"
    by_count = {r["edits"]: set(r) for r in records(run)}
    assert [n for n, figures in by_count.items() if "reliability" in figures] == [0, 1, 3, 4]
    assert [n for n, figures in by_count.items() if "stability/worst_condition_number" in figures] == [0, 2, 4]
    assert len(edits(run)) == 4
    assert not (run / "model").exists()


@pytest.mark.parametrize(
    ("method", "name"), [("memit", "MEMIT"), ("mose", "MOSE, layers by ActivationSelection"), ("ft", "FineTune")]
)
def test_what_a_method_is_called(method: str, name: str) -> None:
    assert load_editor(method).describe() == name


def test_overrides_take_effect(arguments: Command, tmp_path: Path) -> None:
    given = [
        *("--data.n_edits", "2", "--data.batch_size", "2", "--data.offset", "1"),
        *("--retention.every_n", "5", "--retention.at_end", "false", "--stability.every_n", "2"),
        *("--model.dtype", "bfloat16", "--seed_everything", "5"),
        *("--model.editor.contexts", "0", "--model.editor.solver", "ROME", "--model.editor.solver.memory", "true"),
        *("--data.batch_size", "1", "--trainer.max_epochs", "1"),
        *("--export.dirpath", str(tmp_path / "elsewhere"), "--checkpoint.dirpath", str(tmp_path / "kept")),
    ]
    cli = EditCLI([*arguments(), *given])
    run = tmp_path / "memit" / "version_0"
    assert [e["case_id"] for e in edits(run)] == ["c1", "c2"]
    about = read_results(run).run
    assert (about["method"], about["n_edits"], about["batch_size"], about["seed"]) == ("ROME", 2, 1, 5)
    by_count = {r["edits"]: set(r) for r in records(run)}
    assert [n for n, figures in by_count.items() if "reliability" in figures] == [0]
    assert [n for n, figures in by_count.items() if "stability/worst_condition_number" in figures] == [0, 2]
    assert {p.dtype for p in cli.model.model.parameters()} == {torch.bfloat16}
    assert cli.model.session.workspace.contexts == ["{}"]
    assert cli.model.editor.solver.use_memory
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()
    assert (tmp_path / "kept" / "edits.ckpt").is_file()


@pytest.mark.parametrize("spelt", [["--config", "rome.yaml"], ["-c", "rome"], ["--config=rome.yaml"]])
def test_the_command_line_wins_wherever_the_configuration_stands(
    arguments: Command, tmp_path: Path, spelt: list[str]
) -> None:
    (tmp_path / "own.yaml").write_text("retention: {every_n: 7}\nstability: {every_n: 8}", encoding="utf-8")
    given = arguments("rome")
    options = [*given[3:], "--stability.every_n=9"]
    assert given[:3] == ["fit", "--config", "rome.yaml"]
    cli = _Unstarted(["fit", *options, *spelt, "--data.batch_size=1", "--config", str(tmp_path / "own.yaml")])
    assert (type(cli.datamodule), cli.datamodule.path) == (FactsDataModule, str(tmp_path / "facts.json"))
    assert cli.datamodule.n_edits is None
    assert (cli.config.fit.retention.every_n, cli.config.fit.stability.every_n) == (7, 9)
    assert cli.run_name == "rome"


def test_a_long_path_through_init_args_is_the_same(arguments: Command, tmp_path: Path) -> None:
    cli = EditCLI([*arguments(), "--model.editor.init_args.layers.init_args.layers=[0]", "--data.n_edits=1"])
    assert [e.layers for e in cli.model.journal] == [[0]]


def test_downstream_tasks_and_switching_the_logger_off(
    arguments: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = tmp_path / "tasks.json"
    tasks.write_text(json.dumps({"capitals": [{"prompt": "The capital of Peru is", "answer": "Lima"}]}))
    given = ["--downstream.path", str(tasks), "--downstream.n_items", "5", "--downstream.every_n", "2"]
    assert main([*arguments(), *given]) == 0
    found = {r["edits"]: r["downstream/capitals"] for r in records(tmp_path / "memit" / "version_0")}
    assert set(found) == {0, 2, 3}
    assert set(found.values()) <= {0.0, 1.0}


def test_a_resumed_run_goes_on_in_its_folder(arguments: Command, tmp_path: Path) -> None:
    def cut(root: str) -> list[str]:
        every = [f"--{name}.every_n=2" for name in ("checkpoint", "retention", "stability")]
        return [*arguments(n=4), *every, "--trainer.default_root_dir", str(tmp_path / root)]

    assert main(cut("straight")) == 0
    power_cut = [
        "--trust=helpers",
        "--trainer.callbacks",
        "helpers.runs.PowerCut",
        "--trainer.callbacks.batch",
        "3",
    ]
    with pytest.raises(RuntimeError, match="power cut"):
        main([*cut("cut"), *power_cut])
    run = tmp_path / "cut" / "memit" / "version_0"
    assert not (run / "model").exists()
    assert main([*cut("cut"), "--ckpt_path", str(run / "checkpoints" / "edits.ckpt")]) == 0
    straight = tmp_path / "straight" / "memit" / "version_0"
    assert records(run) == records(straight)
    assert [p.name for p in run.parent.iterdir()] == ["version_0"]
    for mine, expected in zip(edits(run), edits(straight), strict=True):
        assert mine | {"seconds": 0, "stages": {}} == expected | {"seconds": 0, "stages": {}}
    one, other = (load_model(str(r / "model"))[0].state_dict() for r in (run, straight))
    torch.testing.assert_close(dict(one), dict(other), rtol=0, atol=0)


def test_the_embedded_data(arguments: Command, tmp_path: Path) -> None:
    """A configuration as it stands, but for the model; its texts are longer than what tiny models mostly see."""
    command = arguments("rome")
    at = command.index("--data")
    del command[at : at + 5]
    given = ["--data.path=embedded", "--data.n_edits", "2", "--retention.at_start", "false"]
    assert main([*command, *given]) == 0
    assert read_results(tmp_path / "rome" / "version_0").run["data"] == "CounterFactDataModule"


# Real records


@pytest.fixture
def roomy_folder(tiny_folder: Folder, tmp_path: Path) -> Folder:
    """The tiny models with room for long texts: their tokenizer makes a token of nearly every letter."""

    def folder(family: str) -> Path:
        config = AutoConfig.from_pretrained(tiny_folder(family), max_position_embeddings=1024)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
        AutoTokenizer.from_pretrained(tiny_folder(family), model_max_length=1024).save_pretrained(tmp_path / family)
        return tmp_path / family

    return folder


@pytest.mark.filterwarnings("ignore:2 of 1000 records cannot be edited and are left out.* record 535, field 'alt'")
@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("CounterFactDataModule", "counterfact/counterfact-edit.json"),
        ("CounterFactDataModule", "counterfact/counterfact-full-1599.json"),
        ("ZsREDataModule", "zsre/zsre-train-1k.json"),
        ("ZsREDataModule", "zsre/zsre-eval-portability.json"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_real_records(
    arguments: Command, roomy_folder: Folder, real_file: Folder, tmp_path: Path, kind: str, file: str, family: str
) -> None:
    command = arguments("memit")
    command[command.index("FactsDataModule")] = kind
    command[command.index("--data.path") + 1] = str(real_file(file))
    command[command.index("--model.model") + 1] = str(roomy_folder(family))
    given = [
        "--data.on_bad_record=skip",
        "--data.n_edits=50",
        "--model.editor.values.steps=1",
        "--model.editor.contexts=1",
    ]
    assert main([*command, *given, "--data.batch_size=10", "--retention.every_n=50"]) == 0
    run = tmp_path / "memit" / "version_0"
    assert len(edits(run)) == 50
    assert [r["edits"] for r in records(run) if "locality" in r] == [0, 50]


# Errors


@pytest.fixture
def refused(capsys: Errors, tmp_path: Path) -> Callable[[list[str]], str]:
    """Runs a command line that is refused; gives the one line it says."""

    def run(command: list[str]) -> str:
        capsys.readouterr()
        assert main(command) == 2
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert line.startswith("error: ")
        assert "Results after" not in said.out
        assert not list(tmp_path.rglob("edits.jsonl"))
        assert not any(records(path.parent) for path in tmp_path.rglob("results.json"))
        return line.removeprefix("error: ")

    return run


Refused = Callable[[list[str]], str]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "The capital city is"}, "facts.json, record 2, field 'subject': 'Peru' does not occur in"),
        ({"target_new": ""}, "facts.json, record 2, field 'target_new'"),
        ({"target_new": 3}, "facts.json, record 2, field 'target_new'"),
        ({"subject": None}, "facts.json, record 2, field 'subject'"),
        ({"prompt": "so " * 200 + "{} is"}, "facts.json, record 2, field 'prompt'"),
    ],
)
def test_bad_records(
    arguments: Command, refused: Refused, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert refused(arguments(**changes)).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "facts.json: there is no such file."),
        ('[{"prompt": ', "facts.json, line 1, column 13: is not valid JSON"),
        ("", "facts.json: the file is empty."),
        ("[]", "facts.json: the file has no records."),
        ("[3]", "facts.json, record 1: is a number, not an object"),
    ],
)
def test_bad_files(arguments: Command, refused: Refused, tmp_path: Path, content: str | None, message: str) -> None:
    command = arguments()
    if content is None:
        (tmp_path / "facts.json").unlink()
    else:
        (tmp_path / "facts.json").write_text(content)
    assert message in refused(command)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("memit", ["--model.editor.layers.layers=[99]"], "Layer 99 does not exist: the model has layers 0 to 3."),
        ("mose", ["--model.editor.layers.layers=[1,99]"], "Layer 99 does not exist: the model has layers 0 to 3."),
        (
            "memit",
            ["--model.editor.layers.layer=[1]"],
            "model.editor.layers: lit_edit.editors.layers.FixedLayers has no option 'layer'",
        ),
        ("memit", ["--model.editor.layers.layers=3"], "model.editor.layers.layers: expected list, got '3'"),
        (
            "memit",
            ["--model.editor.values.site=mpl"],
            "model.editor.values.site: expected Literal['mlp', 'block'], got 'mpl'",
        ),
        ("memit", ["--model.editor.values.lr=-1"], "Values need lr > 0"),
        (
            "memit",
            ["--model.editor.solver=lit_edit.editors.solvers.MEMITT"],
            "model.editor.solver: there is no 'MEMITT' in lit_edit.editors.solvers (did you mean MEMIT?)",
        ),
        ("memit", ["--model.editor.solver=MEMITT"], "model.editor.solver: there is no class 'MEMITT'"),
        ("memit", ["--model.dtype=float8"], "dtype 'float8' is not one of float32, bfloat16, float16, auto."),
        ("memit", ["--model.corpus=nowhere.txt"], "The corpus 'nowhere.txt' cannot be read"),
        ("memit", ["--modell.dtype=float32"], "There is no option --modell.dtype (did you mean --model.dtype?)"),
        ("memit", ["--data.nedits=3"], "data: lit_edit.datamodules.FactsDataModule has no option 'nedits'"),
        ("memit", ["--data.n_edits=few"], "data.n_edits: expected int, got 'few'"),
        ("memit", ["--data.n_edits=0"], "n_edits is 0; it must be at least 1, or null for all."),
        ("memit", ["--data.n_edits=9"], "n_edits=9 edits are asked for, but"),
        ("memit", ["--data=FactDataModule"], "data: there is no class 'FactDataModule'"),
        ("memit", ["--retention.every_n=0"], "every_n should be a positive whole number, or an ascending list"),
        ("memit", ["--retention.every_n=[5,2]"], "or an ascending list of such; it is [5, 2]."),
        (
            "memit",
            ["--downstream.path=nowhere.json", "--downstream.n_items=1"],
            "The task file 'nowhere.json' cannot be read",
        ),
        (
            "memit",
            ["--trainer.devices=many"],
            "trainer: `devices` selected with `CPUAccelerator` should be an int > 0.",
        ),
        ("memit", ["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
        (
            "memit",
            ["--config=nothing.yaml"],
            "There is no configuration 'nothing.yaml', neither here nor among those that come along: alphaedit.yaml,",
        ),
        (
            "memit",
            ["--config=models/llama3-8b/nothing"],
            "those that come along: models/llama3-8b/alphaedit.yaml,",
        ),
        ("memit", ["--config=models/nothing"], "those that come along: models/gpt-j.yaml, models/gpt-j/,"),
        ("rome", ["--data.batch_size=2"], "ROME"),
        (
            "alphaedit",
            ["--model.editor.solver.energy=1e-12"],
            "AlphaEdit finds no null space in layer 'model.layers.1.mlp.down_proj.weight'",
        ),
    ],
)
def test_bad_settings(arguments: Command, refused: Refused, method: str, given: list[str], message: str) -> None:
    assert message in refused([*arguments(method), *given])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "own.yaml is not valid YAML"),
        ("- 3", "own.yaml: a mapping is needed"),
        ("retention: {every: 3}", "does not accept option 'retention.every'"),
        ("trainer: {max_epoch: 3}", "does not accept option 'trainer.max_epoch'"),
        (
            "model: {editor: {class_path: LocateThenEdit, init_args: {value: 3}}}",
            "LocateThenEdit has no option 'value'",
        ),
        (
            "data: {class_path: lit_edit.datamodules.Fact}",
            "data: there is no 'Fact' in lit_edit.datamodules",
        ),
    ],
)
def test_bad_configurations(arguments: Command, refused: Refused, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "own.yaml").write_text(content)
    assert message in refused([*arguments(), "--config", str(tmp_path / "own.yaml")])


def test_a_folder_without_a_model(arguments: Command, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        assert f"{place}: no model there" in refused([*arguments(), "--model.model", str(place)])


def test_a_broken_or_foreign_checkpoint(arguments: Command, refused: Refused, tmp_path: Path) -> None:
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"not a checkpoint")
    assert "broken.ckpt is not a checkpoint that can be read" in refused([*arguments(), "--ckpt_path", str(broken)])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], 'expected "subcommand" to be one of {fit,compare,'),
        (["fit"], "the following arguments are required: fit.model.editor, fit.data (a configuration has them:"),
        (["fitt"], "invalid choice: 'fitt' (choose from 'fit', 'compare', "),
    ],
)
def test_without_a_configuration(refused: Refused, command: list[str], message: str) -> None:
    assert message in refused(command)


def test_an_error_as_a_user_sees_it(arguments: Command, tmp_path: Path) -> None:
    """In a process of its own, where pytest catches nothing: one line and no traceback."""
    command = [sys.executable, str(REPOSITORY / "train.py"), *arguments(target_new=" ")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    (said,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert said.startswith("error: facts.json, record 2, field 'target_new'")


def test_the_traceback_can_be_had(arguments: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_EDIT_TRACEBACK", "1")
    with pytest.raises(RequestError, match="there is no such file"):
        main([*arguments(), "--data.path=nowhere.json"])


# Models of unknown kinds


def test_a_model_of_an_unknown_kind_is_edited_once_its_parts_are_confirmed(
    arguments: Command, refused: Refused, tmp_path: Path
) -> None:
    """The very words of the error, given as an option."""
    folder, tokenizer = tmp_path / "bloom", tiny_tokenizer(bos=False)
    config = BloomConfig(
        hidden_size=32, n_layer=4, n_head=4, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for part in (AutoModelForCausalLM.from_config(config), tokenizer):
            part.save_pretrained(folder)
    command = [*arguments("rome"), "--model.model", str(folder)]
    said = refused(command)
    assert "'bloom' are not described yet" in said
    (option,) = shlex.split(said[said.index("confirm it: ") + len("confirm it: ") :].rstrip("."))
    assert refused([*command, "--dry_run"]) == said
    assert main([*command, option, "--dry_run"]) == 0
    assert main([*command, option, "--model.guard.max_change=1e6"]) == 0  # a random model is not tame
    run = tmp_path / "rome" / "version_0"
    assert len(edits(run)) == 3
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["family"]["down_projection"]
    before, after = (load_model(str(place))[0].state_dict() for place in (folder, run / "model"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        "transformer.h.1.mlp.dense_4h_to_h.weight"
    ]


def test_edit_takes_a_family_too() -> None:
    tokenizer = tiny_tokenizer(bos=False)
    config = BloomConfig(
        hidden_size=16, n_layer=2, n_head=2, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip
    model, editor = AutoModelForCausalLM.from_config(config), quick_editor("rome")
    editor.layers, editor.solver = FixedLayers([0]), ROME(covariance=False)
    fact = EditRequest("1", "The capital of France is", "France", "Lyon")
    with pytest.raises(ValueError, match="not described yet"):
        edit(model, tokenizer, [fact], editor)
    family = Family("transformer.h", "mlp.dense_4h_to_h")
    assert len(edit(model, tokenizer, [fact], editor, family=family)[1]) == 1


def test_null_switches_the_general_abilities_off(arguments: Command, tmp_path: Path) -> None:
    """On the command line, as one word or two, and in a file."""
    command = [word for word in arguments() if not word.startswith("--downstream")]
    (tmp_path / "quiet.yaml").write_text("downstream: null\n", encoding="utf-8")
    for off in (["--downstream=null"], ["--downstream", "null"], ["--config", str(tmp_path / "quiet.yaml")]):
        made = _Unstarted([*command, *off, "--trainer.logger=false"])
        (tasks,) = (callback.tasks for callback in made.trainer.callbacks if isinstance(callback, DownstreamEval))
        assert tasks == []
        assert made.run_name == "memit"


def test_a_folder_of_ones_own_holds_one_run(
    arguments: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own" / "run"
    command = [*arguments(), "--data.n_edits=1", "--export.model=false", "--folder", str(own)]
    assert main(command) == 0
    assert (own / "results.json").is_file()
    assert (own / "config.yaml").is_file()
    assert main(command) == 2
    assert f"error: {own} holds a run already: --resume" in capsys.readouterr().err
