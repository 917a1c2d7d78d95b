from __future__ import annotations

from dataclasses import replace

import pytest
from lit_edit.callbacks import EveryNEdits, MatrixStability, ResultsTable

from lit_edit.requests import EditRequest
from lit_edit.runs.journal import Edit, Journal
from lit_edit.runs.results import ResultsLogger, read_results

# What Lightning says about runs as small as these, and what its own tree utilities call that torch has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
]


class Reliability(EveryNEdits):
    def measure(self, trainer, pl_module, edits):
        return {"reliability": edits / 4}


def test_the_run_ends_with_a_table_of_the_last_measurement(editor, make_trainer, edit_loader, tmp_path, capsys):
    # First in the list, so that the last measurements are taken after its own `on_train_end`.
    callbacks = [ResultsTable(), Reliability(every_n=2), MatrixStability(every_n=2)]
    make_trainer(*callbacks, logger=ResultsLogger(tmp_path)).fit(editor, edit_loader(3, 1))
    lines = capsys.readouterr().out.splitlines()
    assert "Results after 3 edits" in "\n".join(lines)
    row = next(line for line in lines if "reliability" in line)
    assert row.split() == ["reliability", "0", "0.75", "+0.75"]
    assert any(line.split()[:2] == ["stability/worst_spectrum_drift", "0"] for line in lines)  # rounding in bfloat16
    assert max(len(line.rstrip()) for line in lines) <= 80


def test_seconds_are_written_and_add_up(editor, make_trainer, edit_loader, tmp_path):
    make_trainer(ResultsTable(), Reliability(), logger=ResultsLogger(tmp_path)).fit(editor, edit_loader(2, 1))
    first = read_results(tmp_path).run["seconds"]
    assert first > 0
    assert 50e6 < read_results(tmp_path).run["peak_memory_bytes"] < 1e12  # torch alone takes more than the first
    make_trainer(ResultsTable(), Reliability(), logger=ResultsLogger(tmp_path)).fit(editor, edit_loader(2, 1))
    assert read_results(tmp_path).run["seconds"] > first
    assert [record["edits"] for record in read_results(tmp_path).records] == [0, 2, 4]


def test_a_journal_leaves_the_mean_seconds_by_stage(editor, make_trainer, edit_loader, tmp_path):
    """Stages that an edit did not go through count as zero, so that the means add up."""
    stages = [{"values": 3.0, "solve": 1.0}, {"values": 1.0, "write": 0.5}]
    editor.journal = Journal()
    for number, mine in enumerate(stages, start=1):
        request = EditRequest(str(number), "The capital of Peru is", "Peru", "Oslo")
        edit = Edit(number, str(number), request.prompt, "Peru", "Oslo", [1], 0.0, 1.0, 1.0, 1, {"1": 0.1}, 0.0)
        editor.journal.add(request, replace(edit, seconds=sum(mine.values()), stages=mine))
    make_trainer(ResultsTable(), Reliability(), logger=ResultsLogger(tmp_path)).fit(editor, edit_loader(2, 1))
    found = read_results(tmp_path).run["seconds_per_edit"]
    assert found == {"values": 2.0, "solve": 0.5, "write": 0.25, "total": 2.75}


def test_without_a_results_logger_it_only_warns(editor, make_trainer, edit_loader, capsys):
    with pytest.warns(UserWarning, match="found no ResultsLogger"):
        make_trainer(ResultsTable(), Reliability()).fit(editor, edit_loader(2, 1))
    assert "Results after" not in capsys.readouterr().out


def test_a_dry_run_is_quiet(editor, make_trainer, edit_loader, tmp_path):
    make_trainer(ResultsTable(), logger=ResultsLogger(tmp_path), fast_dev_run=True).fit(editor, edit_loader(2, 1))
    assert not (tmp_path / "results.json").exists()


def test_nothing_measured_prints_nothing(editor, make_trainer, edit_loader, tmp_path, capsys):
    make_trainer(ResultsTable(), logger=ResultsLogger(tmp_path)).fit(editor, edit_loader(2, 1))
    assert "Results after" not in capsys.readouterr().out
    assert read_results(tmp_path).records == []
