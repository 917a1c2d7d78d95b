"""What a run leaves behind: the edited model and the record of edits."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lit_edit.journal import Journal


class Exporting(Protocol):
    """What `ExportModel` needs of a module; `LitEdit` has it."""

    @property
    def journal(self) -> Journal:
        """The edits applied so far."""

    def export(self, folder: str | Path) -> None:
        """Writes the model into a folder."""


class ExportModel(Callback):
    """Writes the edited model (as `transformers` loads it) and ``edits.jsonl`` when a fit ends.

    Args:
        dirpath: the model's folder; ``model`` in the run's log directory if None.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        super().__init__()
        self.dirpath = dirpath

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        root = Path(trainer.log_dir or trainer.default_root_dir)
        folder = Path(self.dirpath) if self.dirpath else root / "model"
        module = cast(Exporting, pl_module)
        module.export(folder)
        module.journal.write(root / "edits.jsonl")
        rank_zero_info(f"Edited model: {folder}   edits: {root / 'edits.jsonl'}   results: {root / 'results.json'}")
