"""Seconds of an edit, or of an optimiser's step, by stage."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from lit_edit.runs.journal import Journal
from lit_edit.runs.results import ResultsLogger

from .every_n import EveryNEdits, count_edits


class EditTimer(EveryNEdits):
    """Logs the mean seconds of an edit since the last measurement, by stage (MOSE Table 3, EAC Table 1).

    ``seconds/<stage>`` and ``seconds/total``. Whether the thousandth edit takes as long as the first is so a curve.
    At the end the means of the whole run go into ``seconds_per_edit`` of ``results.json``, where the report finds them.

    A module with a ``journal`` (`lit_edit.LitEdit`) says its stages itself, see `lit_edit.runs.journal.Edit`. In any
    other module they are ``forward`` (from the beginning of the batch to the backward pass), ``backward``, ``step``
    (from there until the optimiser is done) and ``batch end`` (the module's own ``on_train_batch_end``, where editing
    modules write, and the loading of the next batch). Without a backward pass all before ``batch end`` is ``forward``.
    What other callbacks do between two batches is not counted. On a GPU, work that was only queued counts where it is
    waited for.

    Cost: a few calls of the clock for each batch.

    Args:
        every_n: Edits between two measurements, or the counts to measure at.
        at_end: Also measure the last count of the run.

    Example:
        >>> callback = EditTimer(every_n=100)
    """

    def __init__(self, every_n: int | list[int] = 25, at_end: bool = True) -> None:
        super().__init__(every_n, at_start=False, at_end=at_end)
        self._sums: dict[str, float] = {}  # since the last measurement
        self._totals: dict[str, float] = {}  # of the whole run
        self._edits = self._counted = self._from = 0
        self._mark: float | None = None
        self._begin = _Begin(self)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # A batch ends before any other callback measures, and the next one begins when all of them have.
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if c is not self and c is not self._begin]
        trainer.callbacks = [self, *others, self._begin]  # type: ignore[attr-defined]

    @override
    def reset(self) -> None:
        super().reset()
        self._sums, self._totals, self._mark = {}, {}, None
        self._edits = self._counted = self._from = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counted = self._from = count_edits(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._end_batch(trainer, pl_module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        self._lap("forward")

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lap("backward")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._lap("step" if "backward" in self._sums or "backward" in self._totals else "forward")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_batch(trainer, pl_module)
        super().on_train_end(trainer, pl_module)
        self._write(trainer)

    def begin(self) -> None:
        """Starts the clock of a batch."""
        self._mark = time.perf_counter()

    def _lap(self, stage: str) -> None:
        if self._mark is not None:
            now = time.perf_counter()
            self._sums[stage] = self._sums.get(stage, 0.0) + now - self._mark
            self._mark = now

    def _end_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lap("batch end")
        self._mark = None
        edits = count_edits(trainer, pl_module)
        self._edits += edits - self._counted
        self._counted = edits

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
        journal = getattr(pl_module, "journal", None)
        if isinstance(journal, Journal):
            made = journal.edits[self._from : edits]
            stages = dict.fromkeys(stage for edit in made for stage in edit.stages)
            self._sums = {stage: sum(edit.stages.get(stage, 0.0) for edit in made) for stage in stages}
            self._edits = len(made)
        for stage, seconds in self._sums.items():
            self._totals[stage] = self._totals.get(stage, 0.0) + seconds
        number, sums = self._edits, self._sums
        self._sums, self._edits, self._from = {}, 0, edits
        if not number:
            return {}
        means = {f"seconds/{stage}": seconds / number for stage, seconds in sums.items()}
        return {**means, "seconds/total": sum(means.values())}

    @rank_zero_only
    def _write(self, trainer: Trainer) -> None:
        number = self._counted
        for logger in trainer.loggers:
            # `ResultsTable` writes what a journal says, mending included; it comes after this.
            if isinstance(logger, ResultsLogger) and number and self._totals:
                means = {stage: round(seconds / number, 6) for stage, seconds in self._totals.items()}
                logger.log_run({"seconds_per_edit": {**means, "total": round(sum(means.values()), 6)}})

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "totals": self._totals}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._totals = dict(state_dict["totals"])


class _Begin(Callback):
    """Starts the clock when all other callbacks have seen the new batch."""

    def __init__(self, timer: EditTimer) -> None:
        self.timer = timer

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.timer.begin()
