"""What a run leaves behind: the edited model and the record of edits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lit_edit.runs.card import model_card, write_card
from lit_edit.runs.journal import Journal
from lit_edit.runs.results import ResultsLogger


class Exporting(Protocol):
    """What `ExportModel` needs of a module; `LitEdit` has it."""

    @property
    def journal(self) -> Journal:
        """The edits applied so far."""

    def export(self, folder: str | Path) -> None:
        """Writes the model into a folder."""

    def export_delta(self, path: str | Path) -> object:
        """Writes what the edits changed into a file."""


class ExportModel(Callback):
    """Writes the edited model (as `transformers` loads it, with a model card) and ``edits.jsonl`` when a fit ends.

    Args:
        dirpath: the model's folder; ``model`` in the run's log directory if None.
        model: whether to write the model; ``edits.jsonl`` is written in any case.
        delta: whether to write ``delta.safetensors`` into the log directory, which turns the original model into the
            edited one, bit by bit (`lit_edit.load_delta`).
    """

    def __init__(self, dirpath: str | None = None, model: bool = True, delta: bool = False) -> None:
        super().__init__()
        self.dirpath = dirpath
        self.model = model
        self.delta = delta

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        root = Path(trainer.log_dir or trainer.default_root_dir)  # asked for on every rank: it is broadcast
        if not trainer.is_global_zero:
            return
        folder = Path(self.dirpath) if self.dirpath else root / "model"
        module = cast(Exporting, pl_module)
        if self.model:
            module.export(folder)
            self._add_card(trainer, module, folder)
        if self.delta:
            module.export_delta(root / "delta.safetensors")
        module.journal.write(root / "edits.jsonl")
        where = f"Edited model: {folder}   " if self.model else ""
        results = next((logger.path for logger in trainer.loggers if isinstance(logger, ResultsLogger)), None)
        measured = f"   results: {results}" if results is not None else ""
        rank_zero_info(f"{where}edits: {root / 'edits.jsonl'}{measured}")

    @staticmethod
    def _add_card(trainer: Trainer, module: Any, folder: Path) -> None:
        records = next((logger.records for logger in trainer.loggers if isinstance(logger, ResultsLogger)), [])
        edits = [asdict(edit) for edit in module.journal if edit.status == "written"]
        editor = getattr(module, "editor", None)
        method = editor.describe() if editor is not None else ""
        write_card(folder, model_card(getattr(module, "model_name", ""), method, edits, records))
