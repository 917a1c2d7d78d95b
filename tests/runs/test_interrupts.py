"""Runs that are stopped by signals: an edit is finished or dropped, all is saved, the status is what shells expect."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.runs import command_line

from lit_edit.cli import main
from lit_edit.runs.interrupts import Interrupted, interrupt_on_signals, restore_signals, signals_held

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The key covariance was counted over"),
]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_an_exception_and_a_second_one_the_end(number: signal.Signals, status: int) -> None:
    former = interrupt_on_signals()
    try:
        with pytest.raises(Interrupted) as stop:
            signal.raise_signal(number)
        assert stop.value.status == status
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        restore_signals(former)
    assert signal.getsignal(number) is former[number]


def test_a_signal_is_held_until_the_block_ends() -> None:
    former, done = interrupt_on_signals(), []
    try:
        with pytest.raises(Interrupted):  # noqa: PT012 - how far it comes is what is tested
            with signals_held():
                signal.raise_signal(signal.SIGTERM)
                done.append("block")
            done.append("after")
    finally:
        restore_signals(former)
    assert done == ["block"]


def test_a_second_signal_is_not_held() -> None:
    former, done = interrupt_on_signals(), []
    try:
        with pytest.raises(Interrupted), signals_held():  # noqa: PT012 - how far it comes is what is tested
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            done.append("block")
    finally:
        restore_signals(former)
    assert done == []


RUN = "import sys; from lit_edit.cli import main; sys.exit(main())"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_a_stopped_run_goes_on_to_the_same_bits(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    quiet = ["--trainer.enable_progress_bar=false", "--export.model=false", "--data.batch_size=2"]
    arguments = [*command_line(tiny_folder("llama"), tmp_path, "memit", 7), *quiet, "--model.editor.values.steps=60"]
    whole = [*arguments, f"--trainer.default_root_dir={tmp_path / 'whole'}"]
    assert main(whole) == 0
    wanted = torch.load(tmp_path / "whole/memit/version_0/checkpoints/edits.ckpt", weights_only=True)["lit_edit"]
    run = tmp_path / "memit" / "version_0"
    process = subprocess.Popen([sys.executable, "-c", RUN, *arguments], stdout=subprocess.PIPE, text=True)
    while not (run / "edits.jsonl").is_file() or (run / "edits.jsonl").read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 143
    assert f"To go on: lit-edit fit --resume {run}" in said
    saved = torch.load(run / "checkpoints/edits.ckpt", weights_only=True)["lit_edit"]
    made = len(saved["journal"]["edits"])
    assert 2 <= made < 7
    assert made % 2 == 0
    assert (run / "edits.jsonl").read_text().count("\n") == made
    assert len(list((run / "updates").glob("*.safetensors"))) == saved["updates"]["last"]
    assert (run / "results.json").is_file()
    assert main(["fit", "--resume", str(run)]) == 0
    found = torch.load(run / "checkpoints/edits.ckpt", weights_only=True)["lit_edit"]
    assert [edit["number"] for edit in found["journal"]["edits"]] == list(range(1, 8))
    for layer, state in wanted["sites"].items():
        torch.testing.assert_close(found["sites"][layer], state, rtol=0, atol=0)
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
