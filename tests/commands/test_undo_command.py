"""``undo``, ``replay`` and ``export --at`` on runs of the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import assert_same_weights, command_line
from transformers import AutoModelForCausalLM

from lit_edit.cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The key covariance was counted over"),
]
Folder = Callable[[str], Path]
Said = pytest.CaptureFixture[str]


@pytest.fixture
def run(tiny_folder: Folder, tmp_path: Path) -> Path:
    """Four edits with MEMIT."""
    quiet = ["--trainer.enable_progress_bar=false", "--export.model=false"]
    assert main([*command_line(tiny_folder("llama"), tmp_path, "memit", 4), *quiet]) == 0
    return tmp_path / "memit" / "version_0"


def statuses(run: Path) -> list[str]:
    return [json.loads(line)["status"] for line in (run / "edits.jsonl").read_text().splitlines()]


def exported(run: Path, out: Path, *more: str) -> Any:
    assert main(["export", "--run", str(run), "--out", str(out), *more]) == 0
    return AutoModelForCausalLM.from_pretrained(out)


def test_edits_are_taken_back_and_the_run_says_so(run: Path, tiny_folder: Folder, tmp_path: Path, capsys: Said) -> None:
    after = {n: exported(run, tmp_path / f"after-{n}", "--at", str(n)) for n in (0, 2, 3, 4)}
    original = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    assert_same_weights(after[0], original)
    assert_same_weights(after[4], exported(run, tmp_path / "whole"))
    capsys.readouterr()
    assert main(["undo", "--run", str(run), "--last", "1"]) == 0
    assert "Taken back: edits 4. 3 edits are in the weights." in capsys.readouterr().out
    assert statuses(run) == ["written", "written", "written", "undone"]
    assert_same_weights(after[3], exported(run, tmp_path / "three"))
    assert main(["undo", "--run", str(run), "--case", "c0", "--reason", "it was wrong"]) == 0
    assert json.loads((run / "edits.jsonl").read_text().splitlines()[0])["reason"] == "it was wrong"
    assert main(["replay", "--run", str(run)]) == 0
    assert "2 edits, 2 writes: every layer is what" in capsys.readouterr().out
    assert main(["undo", "--run", str(run), "--to", "0"]) == 0
    assert "before the first edit, bit by bit" in capsys.readouterr().out
    assert_same_weights(exported(run, tmp_path / "none"), original)
    assert main(["undo", "--run", str(run), "--to", "0"]) == 0
    assert "nothing to take back" in capsys.readouterr().out
    assert statuses(run) == ["undone"] * 4


def test_mistakes_are_said_in_one_line(run: Path, tmp_path: Path, capsys: Said) -> None:
    for options, said in (
        (["--run", str(run), "--case", "x"], "No edit in the weights has the case id 'x'"),
        (["--run", str(tmp_path), "--last", "1"], "is no folder of a run"),
        (["--run", str(run)], "which edits? One of --last 3"),
    ):
        assert main(["undo", *options]) == 2
        assert said in capsys.readouterr().err
    assert main(["export", "--run", str(run), "--at", "9", "--out", str(tmp_path / "x")]) == 2
    assert "takes a number from 0 to 4, not 9" in capsys.readouterr().err
    for file in (run / "updates").iterdir():
        file.unlink()
    assert main(["replay", "--run", str(run)]) == 2
    assert "has kept no updates" in capsys.readouterr().err
    assert main(["undo", "--run", str(run), "--last", "1"]) == 2
    assert "no longer kept" in capsys.readouterr().err


def test_another_model_is_no_replay(run: Path, tiny_folder: Folder, capsys: Said) -> None:
    path = run / "checkpoints" / "edits.ckpt"
    from lit_edit.files import load_checkpoint, save_checkpoint

    content = load_checkpoint(path)
    state = next(state for state in content["lit_edit"]["sites"].values() if "stored" in state)
    state["stored"] = state["stored"] + 1e-3
    save_checkpoint(path, content)
    assert main(["replay", "--run", str(run)]) == 1
    assert "are not what" in capsys.readouterr().out


def test_a_run_goes_on_after_some_of_its_edits_were_taken_back(
    run: Path, tiny_folder: Folder, tmp_path: Path, capsys: Said
) -> None:
    assert main(["undo", "--run", str(run), "--last", "2"]) == 0
    assert main(["fit", "--resume", str(run), "--trainer.enable_progress_bar=false"]) == 0  # nothing is left to do
    assert statuses(run) == ["written", "written", "undone", "undone"]
    content = torch.load(run / "checkpoints" / "edits.ckpt", weights_only=True)["lit_edit"]
    assert content["last_number"] == 4
    results = json.loads((run / "results.json").read_text())
    assert results["run"]["edits"] == {"written": 2, "undone": 2}
    assert results["records"][-1]["edits"] == 4


def test_other_settings_are_refused_on_resuming(run: Path, capsys: Said) -> None:
    again = ["fit", "--resume", str(run), "--model.editor.values.lr=0.123"]
    assert main(again) == 2
    said = capsys.readouterr().err
    assert "made with other settings: editor.values.lr is" in said
    assert "0.123 here" in said
