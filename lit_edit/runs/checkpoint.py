"""How Lightning's checkpoints of an editing run get to the disk and back: whole, verified, plain types only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from lit_edit import files


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints beside their target and reads them back before they replace it; refuses damaged ones.

    Lightning's own writes to the system's temporary folder and moves the file, which is no single step where that is
    another file system: a full disk or a kill then leaves neither the old checkpoint nor the new one. Paths with a
    protocol (``s3://``) are left to Lightning.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if _is_remote(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        files.save_checkpoint(path, checkpoint)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Raises `lit_edit.files.DamagedFileError` for what is not a whole checkpoint of an editing run."""
        if _is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no checkpoint at {path}.")
        return files.load_checkpoint(path, map_location)

    @classmethod
    def install(cls, trainer: L.Trainer) -> None:
        """Replaces a trainer's way of storing checkpoints, unless the user chose one."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = cls()


def go_on_after(checkpoint: dict[str, Any], batches: int) -> None:
    """Lets Lightning go on after a number of batches, where it counts one more as done than has left edits."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    counts = progress["current"]
    if counts["processed"] > batches or counts["ready"] > batches:
        for kind in counts:
            counts[kind] = batches
        progress["is_last_batch"] = False


def reopen_epoch(checkpoint: dict[str, Any]) -> None:
    """Lets Lightning go on in an epoch that was finished when the data had fewer requests.

    It would otherwise hold the whole run for done, or with a higher `max_epochs` begin again with the first request.
    """
    progress = checkpoint["loops"]["fit_loop"]
    if progress["epoch_progress"]["current"]["processed"]:
        for counts in progress["epoch_progress"].values():
            counts.update(processed=counts["processed"] - 1, completed=counts["processed"] - 1)
    progress["epoch_loop.batch_progress"]["is_last_batch"] = False


def reopen_end(checkpoint: dict[str, Any]) -> None:
    """Lets Lightning end a run again whose checkpoint was saved in the hooks at the epoch's end.

    It would otherwise leave at once, without the hooks at the end of a run, in which callbacks measure. Taken for saved
    at the end of the last batch, it goes through these and edits nothing.
    """
    progress = checkpoint["loops"]["fit_loop"]
    epoch, batch = progress["epoch_progress"], progress["epoch_loop.batch_progress"]
    if epoch["current"]["processed"] > epoch["current"]["completed"] and batch["is_last_batch"]:
        for counts in epoch.values():
            counts["processed"] -= 1
        for kind in ("total", "current"):
            batch[kind]["completed"] = batch[kind]["processed"] - 1


def _is_remote(path: Any) -> bool:
    return "://" in str(path)
