"""`train.py compare`: what is run, what is repeated, what is refused, and what the table says."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.runs import write_corpus, write_facts
from rich.console import Console

from lit_edit.cli import main
from lit_edit.commands.compare import processes
from lit_edit.commands.compare.figure import CURVES, draw
from lit_edit.commands.compare.processes import run_all, threads_per_run
from lit_edit.commands.compare.runs import ASKED, CHECKPOINT, EDITS, LOG, Run, State, differences, plan
from lit_edit.commands.compare.tables import Comparison, judged, quantities
from lit_edit.files import write_json
from lit_edit.runs.report.differences import Difference

Folder = Callable[[str], Path]
Said = pytest.CaptureFixture[str]

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def settings(run: Run) -> dict[str, str]:
    """The options of a run's command that are given as ``--name=value``, the last of each."""
    return dict(word[2:].split("=", 1) for word in run.command if word.startswith("--") and "=" in word)


def finish(run: Run, *, cases: list[str] | None = None, curve: dict[int, dict[str, Any]] | None = None) -> None:
    """Leaves what a complete run leaves, without running it."""
    run.prepare()
    cases = cases if cases is not None else [f"c{i}" for i in range(run.n_edits)]
    curve = curve or {0: {"reliability": 0.0}, run.n_edits: {"reliability": 0.5}}
    about = {"method": run.name.upper(), "seconds": 9.0, "threads": 1, "model": "embedded"}
    write_json(
        run.folder / "results.json",
        {"run": about, "records": [{"edits": edits, **figures} for edits, figures in curve.items()]},
    )
    lines = [
        {
            "number": number,
            "case_id": case,
            "prompt": f"{case} is",
            "target_new": "x",
            "seconds": 3.0,
            "stages": {"values": 1.0 + run.seed, "solve": 2.0 - run.seed},
        }
        for number, case in enumerate(cases, start=1)
    ]
    (run.folder / EDITS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


# What is run


def test_every_method_gets_the_same_edits_and_a_seed_decides_all_that_is_random(tmp_path: Path) -> None:
    runs = plan(["mose", "rome.yaml"], [0, 3], 8, [2, 5], tmp_path)
    assert [(run.name, run.seed) for run in runs] == [("mose", 0), ("rome", 0), ("mose", 3), ("rome", 3)]
    assert len({run.folder for run in runs}) == 4
    for run in runs:
        given = settings(run)
        # Seed 0 is `fit` as it stands: the order of the file.
        assert given["data.seed"] == ("null" if run.seed == 0 else "3")
        assert given["model.seed"] == given["seed_everything"] == str(run.seed)
        assert given["data.n_edits"] == "8"
        for group in ("retention", "stability", "downstream"):
            assert json.loads(given[f"{group}.every_n"]) == [2, 5, 8]


def test_four_equal_parts_unless_told_otherwise(tmp_path: Path) -> None:
    assert plan(["mose"], [0], 100, [], tmp_path)[0].at == (25, 50, 75, 100)
    assert plan(["mose"], [0], 3, [], tmp_path)[0].at == (1, 2, 3)
    assert plan(["mose"], [0], 1, [], tmp_path)[0].at == (1,)


def test_a_method_may_be_laid_over_another_configuration(tmp_path: Path) -> None:
    (tmp_path / "less.yaml").write_text("model: {editor: {init_args: {contexts: 1}}}")
    (tmp_path / "all.yaml").write_text("downstream: {n_items: 0}")
    extra = ["--config", str(tmp_path / "all.yaml"), "--data.batch_size=2"]
    one, two = plan(["memit", f"memit+{tmp_path / 'less.yaml'}"], [0], 8, [], tmp_path / "runs", extra)
    assert (one.name, two.name) == ("memit", "memit+less")
    assert [Path(config).name for config in two.configs] == ["memit.yaml", "less.yaml", "all.yaml"]
    assert two.overrides == ("--data.batch_size=2",)
    assert two.asked["configs"][1:] == [
        {"model": {"editor": {"init_args": {"contexts": 1}}}},
        {"downstream": {"n_items": 0}},
    ]


def test_what_is_passed_on_counts_more_than_what_compare_says_of_itself(tmp_path: Path) -> None:
    run = plan(["mose"], [0], 8, [], tmp_path, ["--downstream.every_n=1000", "--data", "ZsREDataModule"])[0]
    assert settings(run)["downstream.every_n"] == "1000"
    # A class of data given after its settings would lose them.
    assert run.command.index("ZsREDataModule") < run.command.index("--data.n_edits=8")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--configs", "nothing"], "There is no configuration 'nothing'"),
        (["--configs", "mose", "mose.yaml"], "There are two methods with the name 'mose'"),
        (["--configs", "mose", "--n_edits", "0"], "n_edits is 0"),
        (
            ["--configs", "mose", "--n_edits", "many"],
            "compare: n_edits: expected int, got 'many'",
        ),
        (["--configs", "mose", "--n_edits", "10", "--at", "5", "20"], "--at 5 20: counts from 1 to n_edits, 10,"),
        (["--configs", "mose", "--at", "-5"], "--at -5: counts from 1"),
        (["--configs", "mose", "--seeds", "1", "1"], "--seeds 1 1: different whole numbers"),
        (["--configs", "mose", "--jobs", "0"], "--jobs is 0"),
        (["--configs", "mose", "--data.seed=3"], "--data.seed is set by compare: use --seeds"),
        (
            ["--configs", "mose", "--folder=x"],
            "--folder is set by compare: use --out",
        ),
        (["mose", "rome"], "'mose' is not an option"),
        (["--configs", "mose", "--model.editor.nonsense=1"], "mose: "),
        (["--configs", "mose", "--data.path=nowhere.json"], "mose: nowhere.json"),
        (["--configs", "mose", "--n_edits", "100000"], "mose: "),
    ],
)
def test_refusals_are_one_line_and_nothing_is_run(given: list[str], message: str, tmp_path: Path, capsys: Said) -> None:
    assert main(["compare", *given, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_help_names_the_options_and_both_commands(capsys: Said) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "--help"])
    said = capsys.readouterr().out
    for option in ("--configs", "--n_edits", "--at", "--seeds", "--out", "--jobs", "--fresh", "OMP_NUM_THREADS"):
        assert option in said
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    assert re.search(r"^ +fit +\w", said, re.MULTILINE)
    assert re.search(r"^ +compare +\w", said, re.MULTILINE)


def test_facts_of_the_embedded_world_are_refused_for_another_model_before_any_run(tmp_path: Path, capsys: Said) -> None:
    asked = ["compare", "--configs", "rome", "memit", "--n_edits", "2", "--out", str(tmp_path / "out")]
    assert main([*asked, "--model.model", str(tmp_path / "model")]) == 2
    said = capsys.readouterr().err
    assert re.search(r"(rome|memit): ", said)
    assert "facts of the embedded model's invented world" in said
    assert not list(tmp_path.rglob("log.txt"))


def test_compare_after_other_options_is_refused(capsys: Said) -> None:
    assert main(["--config", "mose.yaml", "compare"]) == 2
    assert "compare" in capsys.readouterr().err


# What is repeated


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return plan(["mose"], [1], 4, [2], tmp_path, ["--downstream.n_items=0"])[0]


def test_a_complete_run_is_not_repeated(run: Run) -> None:
    assert run.state() is State.NEW
    finish(run)
    assert run.state() is State.COMPLETE
    assert run_all([run], 1, 1, Console(file=StringIO())) == []


def test_a_run_that_measured_but_did_not_end_is_not_complete(run: Run) -> None:
    finish(run)
    (run.folder / EDITS).unlink()
    assert run.state() is State.NEW
    finish(run, curve={0: {"reliability": 0.0}, 2: {"reliability": 0.5}})
    assert run.state() is State.NEW


def test_a_cut_run_goes_on_from_its_checkpoint(run: Run) -> None:
    finish(run, curve={0: {"reliability": 0.0}, 2: {"reliability": 0.5}})
    assert not any(word.startswith("--ckpt_path") for word in run.command)
    (run.folder / CHECKPOINT).parent.mkdir()
    (run.folder / CHECKPOINT).write_bytes(b"")
    assert run.state() is State.CUT
    assert settings(run)["ckpt_path"] == str(run.folder / CHECKPOINT)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_edits": 8, "at": [2, 8]}, "n_edits: 4 then, 8 now; at: [2, 4] then, [2, 8] now"),
        ({"overrides": ["--data.batch_size=2"]}, 'overrides: ["--downstream.n_items=0"] then, ["--data.batch_size=2"]'),
    ],
)
def test_other_settings_are_refused_by_name(run: Run, changed: dict[str, Any], message: str) -> None:
    finish(run)
    now = replace(run, **{name: tuple(v) if isinstance(v, list) else v for name, v in changed.items()})
    with pytest.raises(ValueError, match="holds a run with other settings") as refusal:
        now.state()
    assert message in str(refusal.value)
    assert "--fresh makes it anew, another --out keeps both" in str(refusal.value)


def test_a_configuration_that_changed_is_refused_by_its_setting_and_fresh_clears_it(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("model: {editor: {class_path: X, init_args: {steps: 3}}}  # a comment")
    (before,) = plan([str(own)], [0], 4, [], tmp_path / "runs")
    finish(before)
    own.write_text("# comments and order do not count\nmodel: {editor: {init_args: {steps: 3}, class_path: X}}")
    assert before.state() is State.COMPLETE
    own.write_text("model: {editor: {class_path: X, init_args: {steps: 4}}}")
    with pytest.raises(ValueError, match=r"\(model\.editor\.steps: 3 then, 4 now\)"):
        before.state()
    before.clear()
    assert before.state() is State.NEW
    assert not before.folder.exists()


def test_a_folder_of_something_else_is_left_alone(run: Run) -> None:
    run.folder.mkdir(parents=True)
    (run.folder / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="was not made by `compare`: choose another --out"):
        run.state()
    run.clear()
    assert (run.folder / "precious.txt").read_text() == "mine"


def test_differences_in_lists_and_of_what_is_new() -> None:
    then = {"restraints": [{"alpha": 1}], "layers": [1, 2]}
    now = {"restraints": [{"alpha": 1}, {"keep": 2}], "layers": [1, 3], "memory": True}
    assert differences(then, now) == (
        "layers: [1, 2] then, [1, 3] now; restraints.2.keep: nothing then, 2 now; memory: nothing then, true now"
    )


# How it goes


def test_threads_are_shared_unless_they_are_said() -> None:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert threads_per_run(1, {}) is None
    assert threads_per_run(2, {}) == max(1, available // 2)
    assert threads_per_run(1000, {}) == 1
    assert threads_per_run(1, {"OMP_NUM_THREADS": "3"}) == 3


# What the tables say


def test_quantities_of_a_record() -> None:
    record = {
        "edits": 5,
        "reliability": 0.5,
        "interval/reliability/low": 0.4,
        "interval/reliability/high": 0.6,
        "downstream/qa": 1.0,
        "downstream/summary": 0.5,
        "stability/worst_condition_number": None,
        "stability/some.weight/condition_number": 3.0,
    }
    found = {name: value for name, (value, _, _) in quantities(record).items()}
    # A run that diverged is not left out of a mean.
    assert found == {"reliability": 0.5, "general_abilities": 0.75, "condition_number": math.inf}
    assert quantities(record)["reliability"] == (0.5, 0.4, 0.6)
    diverged = quantities({"downstream/qa": None, "downstream/summary": 0.5})
    assert diverged == {"general_abilities": (math.inf, None, None)}


def test_a_difference_whose_interval_holds_zero_is_none() -> None:
    clear, none = Difference(0.2, 0.1, 0.3), Difference(0.1, -0.05, 0.25)
    assert judged([clear]) == "+0.20 (+0.10 to +0.30)"
    assert judged([none]) == "none (-0.05 to +0.25)"
    assert judged([clear, none]) == "none (-0.05 to +0.30)"  # nor is one that a seed does not show
    assert judged([Difference(0.1, how="too few edits")]) == "not judged (+0.10)"
    assert judged([None]) == judged([]) == "-"


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """Two methods and two seeds; the second method failed with the second seed."""
    runs = plan(["mose", "rome"], [0, 1], 6, [2], tmp_path)
    complete: list[Run] = []
    for run in runs:
        if (run.name, run.seed) == ("rome", 1):
            continue
        score = {"mose": 0.5, "rome": 0.25}[run.name] + 0.25 * run.seed
        # Batches of three step over 2.
        curve = {0: {"reliability": 0.0}, 3: {"reliability": score, "locality": 1.0}, 6: {"reliability": score / 2}}
        finish(run, curve={n: {**c, "stability/mean_frobenius_norm": 10.0 + n} for n, c in curve.items()})
        complete.append(run)
    return Comparison(runs, complete)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_the_markdown_has_a_table_for_every_point_and_the_stages(comparison: Comparison) -> None:
    sections = comparison.markdown().split("\n## ")
    assert [s.splitlines()[0] for s in sections[1:]] == [
        *("After 2 edits", "After 6 edits", "Difference from mose, after the last edit", "Seconds per edit, by stage"),
    ]
    at = [[cells(line) for line in s.splitlines() if line.startswith("|")] for s in sections[1:]]
    assert at[0][0] == ["", "reliability", "locality", "norm"]
    assert at[0][2:] == [
        ["before", "0", "-", "10"],
        ["mose", "0.625 (0.5 to 0.75)", "1", "13"],
        ["rome (1 of 2 seeds failed)", "0.25", "1", "13"],
    ]
    assert at[1][3][:2] == ["mose", "0.312 (0.25 to 0.375)"]
    # Six edits are too few, and without answers of single edits there are no intervals.
    assert at[2][2:] == [["rome", "not judged (-0.12)", "-", "-"]]
    # Mean over edits, then over seeds: with seed 1 the values took 2 seconds.
    assert at[3][0] == ["", "method", "total", "values", "solve"]
    assert at[3][2] == ["mose", "MOSE", "3.000", "1.500", "1.500"]


def test_a_method_without_any_complete_run_stands_in_the_table_as_failed(tmp_path: Path) -> None:
    runs = plan(["mose", "rome"], [0], 4, [4], tmp_path)
    finish(runs[0])
    found = Comparison(runs, runs[:1])
    rows = [cells(line) for line in found.markdown().splitlines() if line.startswith("| rome")]
    assert rows[0] == ["rome", "failed"]
    assert set(rows[1][2:]) == {"failed"}
    assert found.plain()["methods"][1]["failed_seeds"] == [0]


def test_csv_and_json_hold_every_run(comparison: Comparison) -> None:
    rows = list(csv.DictReader(StringIO(comparison.csv())))
    assert [(r["name"], r["seed"], r["edits"]) for r in rows] == [
        (name, seed, edits) for name, seed in (("mose", "0"), ("mose", "1"), ("rome", "0")) for edits in "036"
    ]
    assert (rows[4]["reliability"], rows[4]["general_abilities"], rows[4]["seconds_values"]) == ("0.75", "", "2.0")
    mose, rome = json.loads(json.dumps(comparison.plain()))["methods"]
    assert mose["points"]["2"]["reliability"] == {
        "mean": 0.625,
        "low": 0.5,
        "high": 0.75,
        "seeds": 2,
        "values": [0.5, 0.75],
    }
    assert rome["failed_seeds"] == [1]
    assert mose["seconds_per_edit"]["total"] == 3.0


def test_runs_that_did_not_edit_the_same_are_not_compared(tmp_path: Path) -> None:
    runs = plan(["mose", "rome"], [0], 3, [], tmp_path)
    finish(runs[0])
    finish(runs[1], cases=["c0", "c7", "c2"])
    with pytest.raises(ValueError, match="rome and mose did not make the same edits with seed 0: edit 2 is case 'c7'"):
        Comparison(runs, runs)


def test_no_figure_has_more_curves_than_can_be_told_apart(tmp_path: Path) -> None:
    runs = [replace(plan(["mose"], [0], 3, [], tmp_path)[0], name=f"m{i}", folder=tmp_path / f"m{i}") for i in range(9)]
    for run in runs:
        finish(run)
    made = draw(Comparison(runs, runs), tmp_path / "made" / "figure.png")
    assert [path.name for path in made] == ["figure.png", "figure-2.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    assert len(runs) > CURVES
    finish(runs[0], curve={0: {"immediate/reliability": 0.5}, 3: {"immediate/reliability": 0.5}})
    assert draw(Comparison(runs[:1], runs[:1]), tmp_path / "nothing.png") == []  # nothing that is drawn
    assert not (tmp_path / "nothing.png").exists()


# All of it


@pytest.fixture
def command(tiny_folder: Folder, tmp_path: Path) -> list[str]:
    """A comparison on a tiny model that takes no time but that of starting Python."""
    (tmp_path / "quick.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {
                    "model": str(tiny_folder("llama")),
                    "corpus": str(write_corpus(tmp_path)),
                    "editor": {
                        "init_args": {
                            "layers": {"init_args": {"layers": [1]}},
                            "values": {"init_args": {"steps": 2}},
                            "contexts": 1,
                        }
                    },
                }
            }
        )
    )
    return [
        *("compare", "--n_edits", "3", "--at", "2", "--out", str(tmp_path / "out")),
        *("--config", str(tmp_path / "quick.yaml"), "--data", "FactsDataModule"),
        *("--data.path", str(write_facts(tmp_path, 5)), "--downstream.n_items=0", "--trainer.accelerator=cpu"),
    ]


def test_a_comparison_with_a_failure_that_is_mended_and_a_run_that_is_cut(
    command: list[str], tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One test, because every run is a process of its own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "tests"))
    (tmp_path / "cut.yaml").write_text(
        "checkpoint: {every_n: 1}\n"
        "trainer: {callbacks: [{class_path: helpers.runs.PowerCutOnce, init_args: {batch: 2, "
        f"mark: {tmp_path / 'mark'}}}}}]}}\n"
    )
    given = [*command, "--configs", "rome", f"memit+{tmp_path / 'cut.yaml'}", "--jobs", "2", "--trust=helpers"]
    assert main(given) == 1
    out = tmp_path / "out"
    said = capsys.readouterr()
    assert "RuntimeError: power cut" in said.out
    assert "failed: memit+cut (seed 0)" in said.err
    assert "| memit+cut | failed" in (out / "table.md").read_text()
    rome = out / "rome" / "seed-0"
    results = json.loads((rome / "results.json").read_text())
    assert [r["edits"] for r in results["records"]] == [0, 2, 3]
    assert results["run"]["threads"] == 1
    assert results["run"]["seconds_per_edit"]["total"] > results["run"]["seconds_per_edit"]["values"] > 0
    assert not (rome / CHECKPOINT).exists()
    assert not (rome / "model").exists()

    written = (rome / "results.json").stat().st_mtime_ns
    assert main(given) == 0
    assert (rome / "results.json").stat().st_mtime_ns == written
    said = capsys.readouterr()
    assert "1 of 2 runs are complete already." in said.out
    log = (out / "memit+cut" / "seed-0" / "log.txt").read_text()
    assert "Restor" in log or "edits.ckpt" in log
    table = json.loads((out / "table.json").read_text())
    assert [m["failed_seeds"] for m in table["methods"]] == [[], []]
    assert [m["method"] for m in table["methods"]] == ["ROME, values at BareKey", "MEMIT"]
    cases = [
        [json.loads(line)["case_id"] for line in (out / name / "seed-0" / EDITS).read_text().splitlines()]
        for name in ("rome", "memit+cut")
    ]
    assert cases[0] == cases[1] == ["c0", "c1", "c2"]
    assert (out / "figure.png").is_file()

    assert main([*given, "--n_edits", "4"]) == 2
    assert "n_edits: 3 then, 4 now" in capsys.readouterr().err


def test_an_interruption_leaves_no_process_behind(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def spy(command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
        started.append(popen([sys.executable, "-c", "import time; time.sleep(60)"], **settings))
        return started[-1]

    def interrupted(*_: Any, **__: Any) -> None:
        while not started:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_edit.commands.compare.processes.subprocess.Popen", spy)
    monkeypatch.setattr("lit_edit.commands.compare.processes.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_all([run], 1, 1, Console(file=StringIO()))
    assert [process.poll() is not None for process in started] == [True]
    assert (run.folder / ASKED).is_file()


def test_being_told_to_end_ends_the_runs_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM, as a scheduler sends it; what handled the signal before handles it again afterwards."""
    started: list[subprocess.Popen[bytes]] = []
    popen, wait = subprocess.Popen, processes.wait

    def spy(command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
        deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); "
        program = f"import signal, time; {deaf if started else ''}time.sleep(60)"
        started.append(popen([sys.executable, "-c", program], **settings))
        return started[-1]

    def told(*args: Any, **settings: Any) -> Any:
        if len(started) == 2 and b"on" in (runs[1].folder / LOG).read_bytes():
            os.kill(os.getpid(), signal.SIGTERM)
        return wait(*args, **settings | {"timeout": 0.01})

    runs = [run, replace(run, folder=run.folder.with_name("other"))]
    monkeypatch.setattr("lit_edit.commands.compare.processes.subprocess.Popen", spy)
    monkeypatch.setattr("lit_edit.commands.compare.processes.wait", told)
    monkeypatch.setattr("lit_edit.commands.compare.processes.GRACE", 0.2)  # for the one that does not listen
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        run_all(runs, 2, 1, Console(file=StringIO()))
    assert end.value.code == 128 + signal.SIGTERM
    assert [process.poll() for process in started] == [-signal.SIGTERM, -signal.SIGKILL]
    assert signal.getsignal(signal.SIGTERM) is before
