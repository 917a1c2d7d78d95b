"""Checkpoints of an editing run."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lit_edit.runs.interrupts import signals_held

from .every_n import EveryNEdits, count_edits


class EditCheckpoint(EveryNEdits):
    """Saves ``edits.ckpt`` every N edits, at the end, and where a run is stopped; the newest only.

    ``fit --ckpt_path`` goes on from it.

    Lightning's ``ModelCheckpoint`` counts optimiser steps, of which editing has none.

    Args:
        dirpath: where; ``checkpoints`` in the run's log directory if None.
        every_n: edits between two checkpoints, or an ascending list of the counts to save at.
    """

    def __init__(self, dirpath: str | None = None, every_n: int | list[int] = 25) -> None:
        super().__init__(every_n, at_start=False, at_end=True)
        self.dirpath = dirpath
        self._path: Path | None = None

    as_if_finished = False

    @property
    def path(self) -> Path | None:
        """Of the checkpoint saved last."""
        return self._path

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # An interrupted run loses no edit; one that never began has none.
        if trainer.training and count_edits(trainer, pl_module):
            try:
                with signals_held():
                    self.measure(trainer, pl_module, count_edits(trainer, pl_module))
            except OSError as error:  # a full disk, perhaps the very reason why the run ends: what it says comes first
                rank_zero_warn(
                    f"The edits since the last checkpoint could not be saved ({error}).", category=UserWarning
                )

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
        folder = Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints")
        # This count is measured already as far as a resumed run is concerned.
        self._last_measured = edits
        with signals_held():
            trainer.save_checkpoint(folder / "edits.ckpt", weights_only=False)
        self._path = folder / "edits.ckpt"
        return {}
