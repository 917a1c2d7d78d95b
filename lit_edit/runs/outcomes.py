"""``outcomes.jsonl``: what became of every edit, at every evaluation, one JSON object a line.

Columns, in the order in which they stand:

* ``edits``: edits applied when this was asked; ``number``: the edit's own place among them, 0 before it was made;
* ``case_id``, ``subject``, ``prompt``, ``expected``: the request, and the answer wanted now (the latest target of its
  fact);
* ``answer_before``, ``answer_after``, ``answer``: greedy answers of the unedited model, right after the edit, and now;
* ``status``: ``holds``, ``forgotten`` (exact right after the edit, not now), ``never written`` (not exact even then),
  or ``to come``; ``neighbours_broken``: locality probes that no longer get the unedited model's answer;
* ``probability``, ``rank``: of the wanted answer now; ``probability_after``, ``rank_after``: right after the edit;
* ``layers``, ``change`` (largest ``‖ΔW‖_F / ‖W‖_F`` of a layer), ``seconds``: of the edit;
* ``questions``: the probes, each with ``kind``, ``prompt``, ``expected``, ``answer``, ``exact``, ``probability``,
  ``rank``.

What is not finite, as after a model's collapse, is null.

``pandas.read_json(path, lines=True)`` and ``datasets.load_dataset("json", data_files=path)`` open it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_edit.evaluation.evaluate import Outcome, Question
from lit_edit.runs.journal import Edit

FILE_NAME = "outcomes.jsonl"
_UNCHANGED = ("locality", "same_subject")


def outcome_record(outcome: Outcome, edit: Edit | None, edits: int, answer_before: str | None) -> dict[str, Any]:
    """One line of the file (see the module).

    Args:
        outcome: What was asked and answered.
        edit: The edit as the journal has it; None before it is made.
        edits: Edits applied so far.
        answer_before: The unedited model's answer.
    """
    own = outcome.own
    if edit is None:
        status = "to come"
    elif own.exact:
        status = "holds"
    else:
        status = "forgotten" if edit.exact else "never written"
    return {
        "edits": edits,
        "number": 0 if edit is None else edit.number,
        "case_id": outcome.request.case_id,
        "subject": outcome.request.subject,
        "prompt": own.prompt,
        "expected": own.expected,
        "answer_before": answer_before,
        "answer_after": None if edit is None else edit.answer,
        "answer": own.answer,
        "status": status,
        "neighbours_broken": sum(q.kind in _UNCHANGED and not q.exact for q in outcome.questions),
        "probability": _finite(own.probability),
        "rank": own.rank,
        "probability_after": None if edit is None else _finite(edit.p_target),
        "rank_after": None if edit is None else edit.rank,
        "layers": [] if edit is None else edit.layers,
        "change": None if edit is None else _largest(edit.change.values()),
        "seconds": None if edit is None else edit.seconds,
        "questions": [_plain(question) for question in outcome.questions[1:]],
    }


def _finite(value: float) -> float | None:
    """JSON has no word for what a model that has diverged answers with."""
    return value if math.isfinite(value) else None


def _largest(values: Iterable[float]) -> float | None:
    found = list(values)
    return max(found, default=0.0) if all(map(math.isfinite, found)) else None  # `max` loses a NaN


def _plain(question: Question) -> dict[str, Any]:
    return {
        "kind": question.kind,
        "prompt": question.prompt,
        "expected": question.expected,
        "answer": question.answer,
        "exact": question.exact,
        "probability": _finite(question.probability),  # instances have none
        "rank": question.rank,
    }


def write_outcomes(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Adds the lines of one evaluation, and waits until they are on the disk.

    Lines of the same count of edits, or a later one, are dropped first: a resumed run measures them again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    first = min((record["edits"] for record in records), default=0)
    if path.exists():
        kept = [line for line in path.read_bytes().splitlines(keepends=True) if _edits_of(line) < first]
        if sum(map(len, kept)) != path.stat().st_size:
            path.write_bytes(b"".join(kept))
    with path.open("ab") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace"))
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())


def _edits_of(line: bytes) -> float:
    """The count of edits of a line; infinite where the line was cut off."""
    try:
        return float(json.loads(line)["edits"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read_outcomes(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, or of the file in a run's folder.

    Raises:
        ValueError: If a line is not one of an outcome; the message names it.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                record["edits"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: is no outcome of an edit ({error}).") from error
            yield record
