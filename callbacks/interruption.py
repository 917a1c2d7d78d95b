"""Runs that are stopped: by a signal at once, with nothing lost."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lit_edit.runs.interrupts import interrupt_on_signals, restore_signals


class StopOnSignal(Callback):
    """Makes SIGINT and SIGTERM end a fit with `lit_edit.runs.interrupts.Interrupted`.

    Lightning answers SIGTERM at the end of a batch only, and takes a Ctrl+C for a run that ended well. Here the other
    callbacks' ``on_exception`` save and sum up, and the exception goes on to the caller. A second signal ends the
    process at once. On a cluster that requeues jobs, leave it out: Lightning's own handlers do that.

    Example:
        >>> callback = StopOnSignal()
    """

    def __init__(self) -> None:
        super().__init__()
        self._former: dict[int, Any] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._install()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install()  # Lightning has set its own since

    def _install(self) -> None:
        former = interrupt_on_signals()
        self._former = self._former or former

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        restore_signals(self._former)
        self._former = {}
