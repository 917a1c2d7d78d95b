"""Checkpoints of an editing run."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from .every_n import EveryNEdits


class EditCheckpoint(EveryNEdits):
    """Saves ``edits.ckpt`` every N edits, the newest only; ``fit --ckpt_path`` goes on from it.

    Lightning's ``ModelCheckpoint`` counts optimiser steps, of which editing has none.

    Args:
        dirpath: where; ``checkpoints`` in the run's log directory if None.
        every_n: edits between two checkpoints, or an ascending list of the counts to save at.
    """

    def __init__(self, dirpath: str | None = None, every_n: int | list[int] = 25) -> None:
        super().__init__(every_n, at_start=False, at_end=True)
        self.dirpath = dirpath

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
        folder = Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints")
        # This count is measured already as far as a resumed run is concerned.
        self._last_measured = edits
        trainer.save_checkpoint(folder / "edits.ckpt", weights_only=False)
        return {}
