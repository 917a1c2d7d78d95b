"""Figures in loggers of others, as far as they go offline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.runs import command_line

from lit_edit.cli import main


@pytest.mark.slow  # it starts a service of its own
def test_weights_and_biases_offline(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    given = ["--trainer.logger=WandbLogger", "--trainer.logger.project=edits", "--trainer.logger.offline=true"]
    given.append(f"--trainer.logger.save_dir={tmp_path / 'board'}")
    assert main([*command_line(tiny_folder("llama"), tmp_path, "memit", 2), *given]) == 0
    (kept,) = (tmp_path / "board").rglob("*.wandb")
    assert b"reliability" in kept.read_bytes()
    run = tmp_path / "memit" / "version_0"  # the run's own folder, whatever it logs to
    assert [r["edits"] for r in json.loads((run / "results.json").read_text())["records"]] == [0, 2]
