"""The record of a run: every edit applied, in order, in plain types."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lit_edit.requests import EditRequest


@dataclass(frozen=True)
class Edit:
    """One applied edit.

    Args:
        number: counts from 1.
        case_id, prompt, subject, target_new: of the request.
        layers: where it was applied.
        loss: of the value optimisation when it stopped.
        p_value: probability of the new target with v* in place, before the weights were changed.
        p_target: the same on the edited weights, right after the update.
        exact: whether every token of the target was then the most likely one.
        rank: worst place of a target token then; 1 if ``exact``.
        answer: the greedy answer then.
        steps: of the value optimisation.
        change: per layer, the Frobenius norm of the change relative to the weight's.
        seconds: for the edit's share of its batch.
        stages: the same by stage: ``layers`` (choosing them), ``values``, ``keys``, ``solve``, ``restrain``, ``write``,
            ``score`` (of ``p_target``) and ``other``.
        rounding: per layer, what the rounding to the weight's dtype took of the change, from 0 to 1 (nothing written);
            see `lit_edit.algebra.updates.Update.apply_`. Where it is carried to the next edit, what of all edits so
            far is not stored, beside this change.
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


@dataclass(frozen=True)
class Mended:
    """Past edits that were written again.

    Args:
        after: Edits applied by then.
        numbers: Numbers of those written again.
        seconds: What it took, asking included.
    """

    after: int
    numbers: list[int]
    seconds: float


class Journal:
    """The edits of a run, the requests they came from, and which were written again."""

    def __init__(self) -> None:
        self.edits: list[Edit] = []
        self.requests: list[EditRequest] = []
        self.mendings: list[Mended] = []

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __getitem__(self, index: int) -> Edit:
        return self.edits[index]

    def add(self, request: EditRequest, edit: Edit) -> None:
        """Appends an edit."""
        self.edits.append(edit)
        self.requests.append(request)

    def seconds_by_stage(self) -> dict[str, float]:
        """Mean seconds of an edit by stage, in the order in which stages first occur, and their sum as ``total``.

        A stage counts as 0 for edits that did not go through it; ``mending`` is shared out over all edits.
        """
        if not self.edits:
            return {}
        n = len(self.edits)
        stages = dict.fromkeys(stage for edit in self.edits for stage in edit.stages)
        means = {stage: sum(e.stages.get(stage, 0.0) for e in self.edits) / n for stage in stages}
        if self.mendings:
            means["mending"] = sum(m.seconds for m in self.mendings) / n
        return {**means, "total": sum(means.values())}

    def write(self, path: Path) -> None:
        """Writes one JSON object a line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(asdict(e), ensure_ascii=False) + "\n" for e in self.edits), encoding="utf-8")

    def state_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Everything in plain types, with what identifies the requests."""
        return {"edits": [asdict(e) for e in self.edits], "mendings": [asdict(m) for m in self.mendings]}

    def load_state_dict(self, state: Mapping[str, Any], requests: Sequence[EditRequest]) -> None:
        """Restores the edits; their requests are found again by case id.

        Raises:
            ValueError: if the data no longer hold a request that was applied.
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
        self.mendings = [Mended(**m) for m in state["mendings"]]
