"""The table that ends a run: what was measured before the first edit and after the last."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.console import Console
from typing_extensions import override

from lit_edit.runs.journal import Journal
from lit_edit.runs.results import ResultsLogger, results_table
from lit_edit.units import counted

from .retention import Retention


class ResultsTable(Callback):
    """Prints `lit_edit.runs.results.results_table` when the run ends, and writes duration and memory into
    ``results.json``.

    Needs a `lit_edit.runs.results.ResultsLogger` among the trainer's loggers; without one it warns and does nothing
    else.
    The ``seconds`` of a resumed run are added to those already in the file. ``peak_memory_bytes`` is what `peak_memory`
    gives. A module with a ``journal`` of edits (`LitEdit`) also leaves ``seconds_per_edit``: the mean by stage, see
    `lit_edit.runs.journal.Journal.seconds_by_stage`.

    Example:
        >>> callback = ResultsTable()
    """

    def __init__(self) -> None:
        super().__init__()
        self._started: float | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()
        # Said before the run, when it can still be put right. A `fast_dev_run` takes all loggers away.
        if _results_of(trainer) is None and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(
                "ResultsTable found no ResultsLogger among the trainer's loggers, so there will be no table.",
                category=UserWarning,
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        try:
            self._sum_up(trainer, pl_module)
        except OSError as error:  # a full disk, perhaps the very reason why the run ends: what it says comes first
            rank_zero_warn(f"The run could not be summed up ({error}).", category=UserWarning)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # `on_train_end` would be too early: callbacks listed after this one take their last measurement there.
        self._sum_up(trainer, pl_module)

    def _sum_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        results = _results_of(trainer)
        if results is None or not trainer.is_global_zero or not results.records:
            return
        if self._started is not None:
            before = results.run.get("seconds") or 0.0
            results.log_run({"seconds": round(before + time.monotonic() - self._started, 3)})
        if (peak := peak_memory(trainer.strategy.root_device)) is not None:
            results.log_run({"peak_memory_bytes": peak})
        journal = getattr(pl_module, "journal", None)
        if isinstance(journal, Journal) and len(journal):
            seconds = {stage: round(mean, 6) for stage, mean in journal.seconds_by_stage().items()}
            results.log_run({"seconds_per_edit": seconds, "edits": journal.counts()})
            said = failures_line(journal)
            if said:
                Console(highlight=False).print(said)
        Console().print(results_table(results.records))
        retention = next((c for c in trainer.callbacks if isinstance(c, Retention)), None)  # type: ignore[attr-defined]
        if retention is not None and retention.counts_by_status:
            print(verdict(retention.counts_by_status), flush=True)


def verdict(counts: Mapping[str, int]) -> str:
    """How many edits hold, and what became of the others, in one line."""
    n = sum(counts.values())
    said = f"{counts.get('holds', 0)} of {counted(n, 'edit')} hold"
    others = []
    if forgotten := counts.get("forgotten", 0):
        others.append(f"{forgotten} forgotten: written, and lost to later edits")
    if never := counts.get("never written", 0):
        others.append(f"{never} never written: not the answer even right after the edit")
    return "; ".join([said, *others]) + (". outcomes.jsonl has each of them." if others else ".")


def failures_line(journal: Journal) -> str:
    """Which edits were refused, tried again or taken back, in one line; nothing if none was."""
    counts = journal.counts()
    words = {"refused": "refused", "retried": "tried again", "undone": "taken back"}
    said = [f"{counts[name]} {word}" for name, word in words.items() if name in counts]
    if not said:
        return ""
    first = next(edit for edit in journal if edit.status != "written" or edit.tries > 1)
    return (
        f"Of {len(journal)} edits {', '.join(said)}; edits.jsonl has the reasons. Edit {first.number}: {first.reason}."
    )


def peak_memory(device: torch.device) -> int | None:
    """The most memory taken, in bytes: on a GPU by tensors, else by the process; None where nobody counts it."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows has no such count
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _results_of(trainer: Trainer) -> ResultsLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, ResultsLogger)), None)
