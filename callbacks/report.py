"""The page that a run leaves."""

from __future__ import annotations

import traceback
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lit_edit.program import program
from lit_edit.runs.report import FILE_NAME, write_report
from lit_edit.runs.results import ResultsLogger

from .every_n import count_edits


class Report(Callback):
    """Writes `lit_edit.runs.report`'s page when a fit ends, also with an error or Ctrl-C after the first edit.

    Needs a `lit_edit.runs.results.ResultsLogger` among the trainer's loggers, and shows what lies beside its
    ``results.json``. List it last: it reads what other callbacks have written. Works in any LightningModule whose
    figures go to that logger, as those of `lit_edit.callbacks.EveryNEdits` do.

    A page that cannot be made does not end the run: everything it is made of is on the disk by then. The error and its
    traceback are printed as a warning, with the command that writes the page later.

    Args:
        enabled: Whether to write the page.
        path: Where it goes; ``report.html`` beside ``results.json`` if None.

    Example:
        >>> callback = Report()
    """

    def __init__(self, enabled: bool = True, path: str | None = None) -> None:
        super().__init__()
        self.enabled = enabled
        self.path = path

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled and _results_of(trainer) is None and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(
                "Report found no ResultsLogger among the trainer's loggers, so there will be no page.",
                category=UserWarning,
            )

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if count_edits(trainer, pl_module):
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        results = _results_of(trainer)
        if not self.enabled or not trainer.is_global_zero or results is None or not results.path.is_file():
            return
        folder = results.directory
        try:
            written = write_report([folder], Path(self.path).expanduser() if self.path else folder / FILE_NAME)
        except Exception:  # whatever it is, hours of edits are worth more than their page
            rank_zero_warn(
                f"The report was not written; all that it is made of is in {folder}. "
                f"Write it later with `{program()} report {folder}`.\n{traceback.format_exc()}",
                category=UserWarning,
            )
            return
        rank_zero_info(f"Report: {written.page}")


def _results_of(trainer: Trainer) -> ResultsLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, ResultsLogger)), None)
