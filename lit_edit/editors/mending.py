"""Mending: past edits that slipped are written again, their old keys replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from lit_edit.editors.base import Editor, Plan
from lit_edit.evaluation.scope import EditedFacts
from lit_edit.evaluation.scores import score_targets
from lit_edit.model.workspace import Workspace


@dataclass(frozen=True)
class Mending:
    """Every N edits, asks for all past edits and writes those again that no longer hold.

    The key of an edit that is written again leaves the memory first: with the old one left in, the second edit fights
    its own memory. The remembered keys are computed anew at the same time, since they drift as lower layers change.
    Works with every editor.

    Args:
        every_n: Edits between two mendings; the end of a run mends as well.
        margin: Probability of the new target below which an edit has slipped, even if it is still the answer.
        rounds: Times that slipped edits are looked for and written, at most.
        batch_size: Edits written again together; editors that take one at a time get one.

    Raises:
        ValueError: For a number out of range.
    """

    every_n: int = 25
    margin: float = 0.3
    rounds: int = 1
    batch_size: int = 25

    def __post_init__(self) -> None:
        if self.every_n < 1 or self.rounds < 1 or self.batch_size < 1 or not 0 <= self.margin < 1:
            raise ValueError(
                "Mending needs every_n, rounds and batch_size of at least 1 and a margin from 0 to below 1, not "
                f"{self.every_n}, {self.rounds}, {self.batch_size} and {self.margin}."
            )

    def is_due(self, last: int, edits: int) -> bool:
        """Whether to mend after this many edits, if the last time was after ``last``."""
        return edits // self.every_n > last // self.every_n

    def run(
        self, workspace: Workspace, editor: Editor, apply: Callable[[Workspace, Plan], object] | None = None
    ) -> list[int]:
        """Mends.

        Args:
            workspace: The edited model.
            editor: The method.
            apply: What writes a plan; the editor itself if None.

        Returns:
            Numbers of the edits that were written again, once for each time.
        """
        facts = EditedFacts(list(workspace.history.values()))
        current = [n for n, request in workspace.history.items() if facts.latest(request) is request]
        size = self.batch_size if editor.max_batch is None else min(self.batch_size, editor.max_batch)
        mended: list[int] = []
        for _ in range(self.rounds):
            slipped = self.slipped(workspace, current)
            if not slipped:
                break
            with workspace.stopwatch.measure("keys"):
                editor.refresh(workspace)
            for start in range(0, len(slipped), size):
                part = slipped[start : start + size]
                with torch.enable_grad():
                    plan = editor.plan(workspace, [workspace.history[n] for n in part])
                (apply or editor.apply)(workspace, replace(plan, numbers=part))
            mended += slipped
        return mended

    def slipped(self, workspace: Workspace, numbers: Sequence[int]) -> list[int]:
        """Those of some edits that are not answered exactly, or not with the margin."""
        requests = [workspace.history[n] for n in numbers]
        rows = [workspace.prompter.row(r.prompt, r.target_new, source=r.source) for r in requests]
        if not rows:
            return []
        scores = score_targets(workspace.model, workspace.prompter, rows)
        sure = (scores.exact & (scores.log_prob.exp() >= self.margin)).tolist()
        return [n for n, holds in zip(numbers, sure, strict=True) if not holds]
