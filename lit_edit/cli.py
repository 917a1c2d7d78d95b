"""The command line: LightningCLI with editing's defaults, configurations found by name, errors in one line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_edit.callbacks import (
    DownstreamEval,
    EditCheckpoint,
    EditProgressBar,
    ExportModel,
    MatrixStability,
    ResultsTable,
    Retention,
)
from lit_edit.configuration import find_config
from lit_edit.datamodules import EditDataModule
from lit_edit.module import LitEdit
from lit_edit.results import ResultsLogger

TRACEBACK = "LIT_EDIT_TRACEBACK"


def _resolve(args: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments with every ``--config`` resolved, and the first one's name without its ending."""
    out: list[str] = []
    stem: str | None = None
    takes_value = False
    for arg in args:
        if takes_value:
            arg = find_config(arg)
            stem = stem or Path(arg).stem
        elif arg.startswith(("--config=", "-c=")):
            option, value = arg.split("=", 1)
            value = find_config(value)
            stem = stem or Path(value).stem
            arg = f"{option}={value}"
        takes_value = arg in ("--config", "-c")
        out.append(arg)
    return out, stem


class EditCLI(LightningCLI):
    """``fit`` for `LitEdit` and the data modules of editing, with the watching callbacks as options of their own.

    Args:
        args: the arguments; those of the process if None.
    """

    def __init__(self, args: ArgsType = None) -> None:
        given = list(sys.argv[1:] if args is None else args)  # type: ignore[arg-type]
        resolved, self.run_name = _resolve(given)
        super().__init__(
            LitEdit,
            EditDataModule,
            subclass_mode_data=True,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={
                "max_epochs": 1,
                "devices": 1,
                "enable_model_summary": False,
                "enable_checkpointing": False,
                "log_every_n_steps": 1,
            },
            parser_kwargs={"exit_on_error": False, "fit": {"exit_on_error": False}},
            args=resolved,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only ``fit``: evaluation happens while editing, by the callbacks."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """``--retention.*``, ``--stability.*``, ``--downstream.*``, ``--checkpoint.*``, ``--export.*``."""
        parser.add_lightning_class_args(Retention, "retention")
        parser.add_lightning_class_args(MatrixStability, "stability")
        parser.add_lightning_class_args(DownstreamEval, "downstream")
        parser.add_lightning_class_args(EditCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ExportModel, "export")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """TensorBoard under ``runs/<configuration>`` unless told otherwise; ``results.json`` beside it always."""
        config = self._get(self.config_init, "trainer", default={})
        if config.get("logger") in (None, True):
            root = config.get("default_root_dir") or "runs"
            kwargs["logger"] = TensorBoardLogger(root, name=self.run_name or "edit")
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.insert(0, EditProgressBar()) if _wants_bar(trainer) else None  # type: ignore[attr-defined]
        trainer.callbacks.append(ResultsTable())  # type: ignore[attr-defined]
        if trainer.loggers:
            trainer.loggers = [*trainer.loggers, ResultsLogger(trainer.log_dir or "runs")]
        return trainer

    def before_fit(self) -> None:
        """Notes in ``results.json`` what is run."""
        model, data = self.model, self.datamodule
        solver = getattr(model.editor, "solver", model.editor)
        for logger in self.trainer.loggers:
            if isinstance(logger, ResultsLogger):
                logger.log_run(
                    {
                        "name": self.run_name,
                        "method": type(solver).__name__,
                        "model": model.model_name,
                        "data": type(data).__name__,
                        "data_path": getattr(data, "path", None),
                        "n_edits": getattr(data, "n_edits", None),
                        "batch_size": getattr(data, "batch_size", None),
                        "seed": self._get(self.config, "seed_everything"),
                        "evaluation": {"definition": "exact_match", "curve": "retention", "locality": "unedited model"},
                    }
                )


def _wants_bar(trainer: Trainer) -> bool:
    """Replaces Lightning's own bar, which is there unless switched off or chosen by the user."""
    own = trainer.progress_bar_callback
    if own is None or isinstance(own, EditProgressBar):
        return False
    trainer.callbacks.remove(own)  # type: ignore[attr-defined]
    return True


def _quiet() -> None:
    """Leaves out what Lightning says about ordinary training and what does not apply to editing."""
    for message in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",
        ".*`configure_optimizers` returned `None`.*",
        ".*you defined a `validation_step` but have no `val_dataloader`.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit status: 0, or 2 after an error said in one line.

    Set ``LIT_EDIT_TRACEBACK=1`` to see where an error came from.
    """
    _quiet()
    try:
        EditCLI(args=None if args is None else list(args))
    except (ArgumentError, ValueError, OSError) as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
