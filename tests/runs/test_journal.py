"""The record of edits: plain types, one JSON object a line, requests found again."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from lit_edit.requests import EditRequest
from lit_edit.runs.journal import Edit, Journal


def request(i: int) -> EditRequest:
    return EditRequest(f"case {i}", f"Zürich{i} is in", f"Zürich{i}", "Peru")


def edit(i: int) -> Edit:
    return Edit(
        i + 1, f"case {i}", f"Zürich{i} is in", f"Zürich{i}", "Peru", [1, 2], 0.5, 0.9, 0.8, 7, {"1": 0.1}, 0.01
    )


def journal(n: int) -> Journal:
    made = Journal()
    for i in range(n):
        made.add(request(i), edit(i))
    return made


def test_it_is_a_sequence_of_edits() -> None:
    made = journal(3)
    assert (len(made), list(made), made[1]) == (3, [edit(0), edit(1), edit(2)], edit(1))
    assert made.requests == [request(0), request(1), request(2)]
    assert len(Journal()) == 0


def test_one_object_a_line(tmp_path: Path) -> None:
    journal(3).write(tmp_path / "new" / "edits.jsonl")
    text = (tmp_path / "new" / "edits.jsonl").read_text(encoding="utf-8")
    assert "Zürich0" in text  # for people to read, not escaped
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines == [asdict(edit(i)) for i in range(3)]
    assert list(lines[0]) == [f.name for f in fields(Edit)]


def test_state_goes_through_json_and_back() -> None:
    state = json.loads(json.dumps(journal(3).state_dict()))
    restored = Journal()
    # The data may hold them in another order, and more of them.
    restored.load_state_dict(state, [request(4), request(2), request(1), request(0)])
    assert list(restored) == list(journal(3))
    assert restored.requests == journal(3).requests


def test_data_without_an_edited_request_are_refused() -> None:
    restored = Journal()
    with pytest.raises(
        ValueError, match=r"holds 3 edits, but the data lack 2 of their requests \(case 'case 1' first\)"
    ):
        restored.load_state_dict(journal(3).state_dict(), [request(0)])
    assert len(restored) == 0
