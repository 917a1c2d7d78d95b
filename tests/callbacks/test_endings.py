"""What a run says as it goes and at its end: figures where they were measured, a verdict, the commands that follow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lit_edit.callbacks import EditProgressBar, EveryNEdits
from lit_edit.callbacks.results_table import failures_line, verdict

from lit_edit.program import program
from lit_edit.requests import EditRequest
from lit_edit.runs.journal import Edit, Event, Journal
from lit_edit.units import counted, parse_size


class Fixed(EveryNEdits):
    """Has measured something at some time."""

    def __init__(self, at: int | None, **figures: float) -> None:
        super().__init__()
        self._last_measured, self.latest = at, figures

    def measure(self, *_: Any) -> dict[str, float]:
        return {}


def test_a_line_holds_what_was_measured_at_its_count_and_nothing_older(capsys: pytest.CaptureFixture[str]) -> None:
    bar, said = EditProgressBar(), []
    bar.print = lambda line: said.append(line)  # type: ignore[method-assign, assignment]
    older = Fixed(25, **{"stability/worst_condition_number": 6.96, "downstream/inference": 1.0})
    trainer: Any = SimpleNamespace(callbacks=[Fixed(30, reliability=0.5), older, Fixed(None)])
    measured = bar._measured(trainer)
    assert measured == {30: {"rel": 0.5}, 25: {"cond": 6.96, "inference": 1.0}}


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"holds": 3}, "3 of 3 edits hold."),
        ({"holds": 1}, "1 of 1 edit hold."),
        (
            {"holds": 59, "forgotten": 9, "never written": 32},
            "59 of 100 edits hold; 9 forgotten: written, and lost to later edits; 32 never written: not the answer "
            "even right after the edit. outcomes.jsonl has each of them.",
        ),
    ],
)
def test_the_verdict_says_what_became_of_the_edits(counts: dict[str, int], said: str) -> None:
    assert verdict(counts) == said


def edit(number: int, **more: Any) -> Edit:
    return Edit(number, f"c{number}", "p", "s", "t", [1], 0.1, 0.9, 0.8, 3, {"1": 0.1}, 0.1, **more)


def test_failures_are_summed_up_with_the_first_reason() -> None:
    journal = Journal()
    request = EditRequest("c", "s is", "s", "t")
    journal.add(request, edit(1))
    assert failures_line(journal) == ""
    journal.add(request, edit(2, status="refused", reason="it explodes", tries=0))
    journal.add(request, edit(3, tries=2, reason="too weak"))
    journal.add(request, edit(4))
    journal.note(Event("undone", 4, [4], 0.1, "wrong"))
    assert failures_line(journal) == (
        "Of 4 edits 1 refused, 1 tried again, 1 taken back; edits.jsonl has the reasons. Edit 2: it explodes."
    )


@pytest.mark.parametrize(
    ("called", "named"), [("/x/train.py", "python train.py"), ("/bin/lit-edit", "lit-edit"), ("pytest", "lit-edit")]
)
def test_proposed_commands_begin_as_the_user_called_the_program(
    monkeypatch: pytest.MonkeyPatch, called: str, named: str
) -> None:
    monkeypatch.setattr("sys.argv", [called])
    assert program() == named


def test_counts_and_sizes_for_people() -> None:
    assert [counted(n, "edit") for n in (0, 1, 2000)] == ["0 edits", "1 edit", "2,000 edits"]
    assert [parse_size(text) for text in ("2GB", "850 kB", "1000", 7, "1.5M", "0")] == [
        2_000_000_000, 850_000, 1000, 7, 1_500_000, 0,
    ]  # fmt: skip
    for bad in ("lots", "-1", "1e9", -4):
        with pytest.raises(ValueError, match="is not a size: 2GB, 850MB"):
            parse_size(bad)
