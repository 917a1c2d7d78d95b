"""``outcomes.jsonl``: what became of every edit, as a person or pandas reads it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import load_dataset

from lit_edit.evaluation.evaluate import Outcome, Question
from lit_edit.requests import EditRequest
from lit_edit.runs.journal import Edit
from lit_edit.runs.outcomes import outcome_record, read_outcomes, write_outcomes

REQUEST = EditRequest("c7", "The capital of Peru is", "Peru", "Cusco")
EDIT = Edit(3, "c7", REQUEST.prompt, "Peru", "Cusco", [1, 2], 0.1, 0.9, 0.8, 12, {"1": 0.1, "2": 0.3}, 0.5, True, 1)


def outcome(exact: bool, neighbours: tuple[bool, ...] = (True, False)) -> Outcome:
    own = Question("reliability", REQUEST.prompt, "Cusco", "Cusco" if exact else "Lima", exact, 1.0, 0.7, 1)
    kinds = ("locality", "same_subject", "consistency")
    rest = [Question(kind, "?", "a", "b", hit, 0.0, 0.1, 4) for kind, hit in zip(kinds, neighbours, strict=False)]
    return Outcome(REQUEST, [own, *rest])


def record(edits: int = 4, exact: bool = True, edit: Edit | None = EDIT) -> dict[str, Any]:
    return outcome_record(outcome(exact), edit, edits, "Lima")


@pytest.mark.parametrize(
    ("exact", "edit", "status"),
    [
        (True, EDIT, "holds"),
        (False, EDIT, "forgotten"),
        (False, replace(EDIT, exact=False), "never written"),
        (True, replace(EDIT, exact=False), "holds"),  # mended, or helped by others
        (False, None, "to come"),
    ],
)
def test_the_status_of_an_edit(exact: bool, edit: Edit | None, status: str) -> None:
    assert record(exact=exact, edit=edit)["status"] == status


def test_only_what_should_not_have_changed_counts_as_broken() -> None:
    found = outcome_record(outcome(True, (False, False, False)), EDIT, 4, None)
    assert found["neighbours_broken"] == 2
    assert [q["kind"] for q in found["questions"]] == ["locality", "same_subject", "consistency"]


def test_pandas_and_datasets_open_it(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    write_outcomes(path, [record(0, False, None), record(0, False, None)])
    write_outcomes(path, [record(4), record(4, False)])
    frame = pd.read_json(path, lines=True)
    assert frame.groupby("edits").status.value_counts().to_dict() == {
        (0, "to come"): 2,
        (4, "forgotten"): 1,
        (4, "holds"): 1,
    }
    assert frame.change.iloc[-1] == pytest.approx(0.3)
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert data["status"] == ["to come", "to come", "holds", "forgotten"]
    assert data[2]["questions"][0]["prompt"] == "?"
    assert list(read_outcomes(tmp_path)) == [json.loads(line) for line in path.read_text().splitlines()]


def test_a_model_that_has_diverged_is_on_file(tmp_path: Path) -> None:
    """Its probabilities are NaN, for which JSON has no word; the run goes on."""
    found = outcome(False)
    lost = [replace(question, probability=math.nan) for question in found.questions]
    edit = replace(EDIT, p_target=math.nan, change={"1": 0.1, "2": math.nan})
    write_outcomes(tmp_path / "outcomes.jsonl", [outcome_record(Outcome(REQUEST, lost), edit, 4, "Lima")])
    (line,) = read_outcomes(tmp_path)
    assert [line[name] for name in ("probability", "probability_after", "change")] == [None, None, None]
    assert [question["probability"] for question in line["questions"]] == [None, None]
    assert (line["status"], line["rank"]) == ("forgotten", 1)


def test_a_resumed_run_measures_again_what_came_later(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    for edits in (0, 2, 4):
        write_outcomes(path, [record(edits)])
    with path.open("a") as file:
        file.write('{"edits": 6, "cut o')  # a kill in the middle of a line
    write_outcomes(path, [record(4)])
    assert [r["edits"] for r in read_outcomes(path)] == [0, 2, 4]
    path.write_text("[]\n")
    with pytest.raises(ValueError, match="line 1: is no outcome"):
        list(read_outcomes(path))


def test_odd_characters_are_kept(tmp_path: Path) -> None:
    odd = {**record(), "answer": "a\ud800b\n</script>"}
    write_outcomes(tmp_path / "o", [odd])
    (found,) = read_outcomes(tmp_path / "o")
    assert found["answer"].endswith("b\n</script>")
