"""What a run leaves edit by edit: its journal, and the updates that undo goes by."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lit_edit.runs.updates import LIMIT
from lit_edit.units import parse_size


class Logging(Protocol):
    """What `EditLog` needs of a module; `LitEdit` has it."""

    def keep_in(self, folder: Path, before: Path | None, limit: int) -> None:
        """Keeps journal and updates in a folder, see `lit_edit.session.EditSession.keep_in`."""


class EditLog(Callback):
    """Keeps ``edits.jsonl``, ``events.jsonl`` and ``updates/`` in the run's log directory, edit by edit.

    Every line and file is on the disk before the next edit begins. `lit-edit undo` and `replay` go by them.

    Args:
        limit: Size of ``updates/`` at most, as in ``2GB``; beyond it the oldest updates are merged into one point, and
            can be taken back only all together. ``0`` keeps none.

    Raises:
        ValueError: If the limit is not a size.
        TypeError: At the start of a fit, if the module is not a `LitEdit`.
    """

    def __init__(self, limit: str | int = LIMIT) -> None:
        super().__init__()
        self.limit = parse_size(limit)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After a checkpoint was restored, and before the first edit.
        folder = trainer.log_dir  # asked for on every rank: it is broadcast
        if folder is None or not trainer.is_global_zero:
            return
        if not hasattr(pl_module, "keep_in"):
            raise TypeError(f"EditLog keeps edits; {type(pl_module).__name__} makes none (LitEdit does).")
        before = Path(trainer.ckpt_path).resolve().parent.parent if trainer.ckpt_path else None
        cast(Logging, pl_module).keep_in(Path(folder), before, self.limit)
