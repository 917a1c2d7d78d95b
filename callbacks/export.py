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
        model: whether to write the model; ``edits.jsonl`` is written in any case.
    """

    def __init__(self, dirpath: str | None = None, model: bool = True) -> None:
        super().__init__()
        self.dirpath = dirpath
        self.model = model

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        root = Path(trainer.log_dir or trainer.default_root_dir)
        folder = Path(self.dirpath) if self.dirpath else root / "model"
        module = cast(Exporting, pl_module)
        if self.model:
            module.export(folder)
        module.journal.write(root / "edits.jsonl")
        where = f"Edited model: {folder}   " if self.model else ""
        rank_zero_info(f"{where}edits: {root / 'edits.jsonl'}   results: {root / 'results.json'}")
