"""TensorBoard: summaries first, single matrices apart, and a run in the HParams tab."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_edit.runs.board import EditBoard, board_tag


@pytest.mark.parametrize(
    ("tag", "shown"),
    [
        ("reliability", "reliability"),
        ("downstream/qa", "downstream/qa"),
        ("stability/worst_condition_number", "stability/worst_condition_number"),
        ("stability/model.layers.2.weight/frobenius_norm", "matrices/model.layers.2.weight/frobenius_norm"),
        ("interval/locality/low", "intervals/locality/low"),
    ],
)
def test_sections(tag: str, shown: str) -> None:
    assert board_tag(tag) == shown


def test_a_run_is_in_the_hparams_tab(tmp_path: Path) -> None:
    board = EditBoard(tmp_path, name="memit", version="version_0")
    board.log_metrics({"reliability": 0.5, "stability/w/norm": 2.0}, step=3)
    board.log_outcome({"method": "MEMIT", "n_edits": 3, "data": None}, {"reliability": 0.5})
    board.finalize("success")
    found = EventAccumulator(str(tmp_path / "memit" / "version_0"))
    found.Reload()
    assert [event.step for event in found.Scalars("reliability")] == [3]
    assert "matrices/w/norm" in found.Tags()["scalars"]
    assert [event.value for event in found.Scalars("hparams/reliability")] == [0.5]
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert content.plugin_name == "hparams"
    assert b"MEMIT" in content.content
