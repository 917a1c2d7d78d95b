"""The record of a run: every edit, in order, and what became of it, in plain types.

In a run's folder: ``edits.jsonl`` has a line for every edit, appended as soon as it is written; ``events.jsonl`` one
for everything that happened to edits later.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lit_edit.files import write_whole
from lit_edit.requests import EditRequest

EDITS_FILE, EVENTS_FILE = "edits.jsonl", "events.jsonl"
Status = Literal["written", "refused", "undone"]


@dataclass(frozen=True)
class Edit:
    """One edit.

    Args:
        number: Number of the edit, from 1.
        case_id, prompt, subject, target_new: As in the request.
        layers: Layers it was written into.
        loss: Loss of the value optimisation when it stopped.
        p_value: Probability of the new target with v* in place, before the weights were changed.
        p_target: The same on the edited weights, right after the update.
        exact: Whether every token of the target was then the most likely one.
        rank: Worst place of a target token then; 1 if ``exact``.
        answer: Greedy answer then.
        steps: Steps of the value optimisation.
        change: Frobenius norm of the change relative to the weight's, by layer.
        seconds: Seconds of the edit's share of its batch.
        stages: The same by stage: ``layers`` (choosing them), ``values``, ``keys``, ``solve``, ``restrain``, ``write``,
            ``score`` (of ``p_target``) and ``other``.
        rounding: Share of the change that rounding to the weight's dtype took, by layer, from 0 to 1 (nothing written);
            see `lit_edit.algebra.updates.Update.apply_`. Where it is carried to the next edit, what of all edits so
            far is not stored, beside this change.
        status: ``written``; ``refused`` if it is not in the weights because it failed, see `lit_edit.editors.Guard`;
            ``undone`` if it was taken back later.
        reason: Why it is not in the weights, or why it was tried again.
        tries: Times it was written, when it was made.
    """

    number: int
    case_id: str
    prompt: str
    subject: str
    target_new: str
    layers: list[int]
    loss: float
    p_value: float
    p_target: float
    steps: int
    change: dict[str, float]
    seconds: float
    exact: bool = False
    rank: int = 0
    answer: str = ""
    stages: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    status: Status = "written"
    reason: str = ""
    tries: int = 1


@dataclass(frozen=True)
class Event:
    """Something that happened to edits after they were made.

    Attributes:
        event: ``mended``: they had slipped and were written again. ``undone``: they were taken back. ``rewritten``:
            they had been written together with others that were taken back, and were written again alone.
            ``collapsed``: a figure of the model left the bounds of a `lit_edit.callbacks.CollapseGuard`.
        after: Edits made by then.
        numbers: Of the edits.
        seconds: What it took, asking included.
        reason: Why.
    """

    event: Literal["mended", "undone", "rewritten", "collapsed"]
    after: int
    numbers: list[int]
    seconds: float
    reason: str = ""


class Journal:
    """The edits of a run, the requests they came from, and what happened to them later."""

    def __init__(self) -> None:
        self.edits: list[Edit] = []
        self.requests: list[EditRequest] = []
        self.events: list[Event] = []
        self._folder: Path | None = None

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __getitem__(self, index: int) -> Edit:
        return self.edits[index]

    @property
    def standing(self) -> list[tuple[Edit, EditRequest]]:
        """The edits that nobody has taken back, with their requests: those a run is judged by, refused ones
        included."""
        return [(e, r) for e, r in zip(self.edits, self.requests, strict=True) if e.status != "undone"]

    def counts(self) -> dict[str, int]:
        """Edits by status, those that were tried again as ``retried``, and how often edits were ``mended``."""
        found = Counter[str](edit.status for edit in self.edits)
        found["retried"] = sum(edit.tries > 1 for edit in self.edits)
        found["mended"] = sum(len(event.numbers) for event in self.events if event.event == "mended")
        return {name: count for name, count in found.items() if count}

    def add(self, request: EditRequest, edit: Edit) -> None:
        """Appends an edit."""
        self.edits.append(edit)
        self.requests.append(request)
        self._append(EDITS_FILE, edit)

    def note(self, event: Event) -> None:
        """Appends an event. Edits that were taken back are marked as such."""
        self.events.append(event)
        self._append(EVENTS_FILE, event)
        if event.event == "undone":
            gone = set(event.numbers)
            for i, edit in enumerate(self.edits):
                if edit.number in gone:
                    self.edits[i] = replace(edit, status="undone", reason=event.reason)
            if self._folder is not None:
                self.write(self._folder / EDITS_FILE)

    def seconds_by_stage(self) -> dict[str, float]:
        """Mean seconds of an edit by stage, in the order in which stages first occur, and their sum as ``total``.

        A stage counts as 0 for edits that did not go through it; ``mending`` is shared out over all edits.
        """
        if not self.edits:
            return {}
        n = len(self.edits)
        stages = dict.fromkeys(stage for edit in self.edits for stage in edit.stages)
        means = {stage: sum(e.stages.get(stage, 0.0) for e in self.edits) / n for stage in stages}
        mendings = [event.seconds for event in self.events if event.event == "mended"]
        if mendings:
            means["mending"] = sum(mendings) / n
        return {**means, "total": sum(means.values())}

    # Files

    def keep_in(self, folder: Path) -> None:
        """Writes all so far into a folder, and from now on every edit and event as it comes."""
        if self.edits or (folder / EDITS_FILE).exists():
            self.write(folder / EDITS_FILE)
        if self.events or (folder / EVENTS_FILE).exists():
            _write(folder / EVENTS_FILE, self.events)
        self._folder = folder

    def write(self, path: Path) -> None:
        """Writes one JSON object an edit and line, whole or not at all."""
        _write(path, self.edits)

    def _append(self, name: str, record: Edit | Event) -> None:
        if self._folder is None:
            return
        with (self._folder / name).open("ab") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())

    # Checkpoints

    def state_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Everything in plain types, with what identifies the requests."""
        return {"edits": [asdict(e) for e in self.edits], "events": [asdict(e) for e in self.events]}

    def load_state_dict(self, state: Mapping[str, Any], requests: Sequence[EditRequest]) -> None:
        """Restores the edits; their requests are found again by case id.

        Raises:
            ValueError: If the data no longer hold a request that was applied.
        """
        known = {r.case_id: r for r in requests}
        edits = [Edit(**e) for e in state["edits"]]
        missing = [e.case_id for e in edits if e.case_id not in known]
        if missing:
            raise ValueError(
                f"The checkpoint holds {len(edits)} edits, but the data lack {len(missing)} of their requests (case "
                f"{missing[0]!r} first): resume with the data the run was started with."
            )
        self.edits, self.requests = edits, [known[e.case_id] for e in edits]
        self.events = [Event(**e) for e in state["events"]]


def _line(record: Edit | Event) -> bytes:
    # A lone surrogate, which JSON files may hold, has no UTF-8 form: it stays an escape.
    text = json.dumps({name: _plain(value) for name, value in asdict(record).items()}, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _plain(value: Any) -> Any:
    """JSON has no word for numbers that are not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, records: Sequence[Edit | Event]) -> None:
    content = b"".join(_line(record) for record in records)
    write_whole(path, lambda draft: draft.write_bytes(content))
