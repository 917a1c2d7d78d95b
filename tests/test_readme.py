"""Every command and every Python block of the README is run, with smaller numbers where it would take long."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from lit_edit.cli import main

REPOSITORY = Path(__file__).resolve().parent.parent
GUIDE = (REPOSITORY / "docs" / "real-models.md").read_text(encoding="utf-8")
CALLBACKS = (REPOSITORY / "docs" / "callbacks.md").read_text(encoding="utf-8")
USAGE = (REPOSITORY / "docs" / "usage.md").read_text(encoding="utf-8")
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SMALLER = [
    "--data.init_args.n_edits=2",
    "--retention.every_n=2",
    "--stability.every_n=2",
    "--downstream.n_items=0",
    "--model.corpus_tokens=4000",
]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands() -> list[str]:
    """The lines of all shell blocks, comments left out."""
    return [line for block in blocks("bash") for line in lines(block)]


def run(command: list[str], cwd: Path, **kwargs: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def smaller(arguments: list[str]) -> list[str]:
    """A command of train.py with smaller numbers; what stands later on the line counts."""
    if arguments[0] == "compare":
        return [
            *arguments,
            "--configs",
            "rome",
            "--n_edits",
            "2",
            "--at",
            "2",
            "--seeds",
            "0",
            "--downstream.n_items=0",
        ]
    if arguments[0] == "statistics":
        return [*arguments, "--model.corpus_tokens=4000"]
    if arguments[0] == "fit" and "--print_config" not in arguments and "--dry_run" not in arguments:
        bounded = any("downstream/" in argument for argument in arguments)  # a guard that has to find the figure
        return [*arguments, *SMALLER, *(["--downstream.n_items=2"] if bounded else [])]
    return arguments


def train(arguments: list[str], folder: Path) -> None:
    """A command of train.py in this process: a new one takes seconds to import torch."""
    with contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few tokens of the corpus are warned of
        try:
            status = main(smaller(arguments))
        except SystemExit as end:  # as --print_config ends
            status = int(end.code or 0)
    assert status == 0, arguments


def test_the_readme_stays_within_three_screens() -> None:
    """Of sixty lines; its rows of figures and of commands do not wrap on a wide one."""
    assert len(README.splitlines()) <= 180


def test_the_readme_has_the_two_commands_that_set_everything_up() -> None:
    assert commands()[:2] == ["make run", "make test"]


@pytest.mark.parametrize("target", ["run", "test"])
def test_make_creates_the_environment_and_installs_first(target: str) -> None:
    said = run(["make", "--dry-run", "--always-make", target], REPOSITORY).stdout
    order = [
        said.index("-m venv"),
        said.index("pip install --quiet -c constraints.txt torch"),
        said.index("-e '.[dev]'"),
    ]
    last = said.index("train.py fit --config mose.yaml" if target == "run" else "-m pytest")
    assert order == sorted(order)
    assert order[-1] < last


def lines(block: str) -> list[str]:
    """The commands of a block, without comments."""
    found = [line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in found if line and not line.startswith("#")]


@pytest.mark.parametrize(
    "block",
    [b for text in (README, USAGE, GUIDE, CALLBACKS) for b in blocks("bash", text) if "train.py" in b],
    ids=lambda b: lines(b)[0].split("train.py ")[-1][:60],
)
def test_every_block_of_commands_runs_in_order(block: str, tmp_path: Path) -> None:
    (tmp_path / "docs").symlink_to(REPOSITORY / "docs")
    for line in lines(block):
        words = shlex.split(line)
        if words[0] == ".venv/bin/tensorboard":
            continue  # a server; what it would read is tested below
        if words[:2] == [".venv/bin/python", "train.py"]:
            train(words[2:], tmp_path)
        else:
            assert words[:2] == [".venv/bin/python", "-c"], line
            run([sys.executable, *words[1:]], tmp_path)


def test_every_other_command_is_known() -> None:
    rest = [c for c in commands() if not c.startswith((".venv/bin/python train.py", ".venv/bin/python -c"))]
    assert rest == ["make run", "make test", ".venv/bin/tensorboard --logdir runs"]


def test_tensorboard_reads_a_run(tmp_path: Path) -> None:
    run([sys.executable, str(REPOSITORY / "train.py"), *smaller(["fit", "--config", "mose.yaml"])], tmp_path)
    program = "from tensorboard.main import run_main; run_main()"
    said = run([sys.executable, "-c", program, "--inspect", "--logdir", str(tmp_path / "runs")], tmp_path).stdout
    assert "reliability" in said


@pytest.mark.parametrize("block", blocks("python") + blocks("python", CALLBACKS), ids=lambda b: b.split("\n")[0])
def test_every_python_block_runs(block: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(block, encoding="utf-8")
    said = run([sys.executable, str(script)], tmp_path).stdout
    assert re.search(r"\d", said.splitlines()[-1])
