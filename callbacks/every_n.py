"""When to measure: before the first edit, whenever N more edits are in the weights, and at the end of the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override


def count_edits(trainer: Trainer, pl_module: LightningModule) -> int:
    """How many updates the weights of the module have seen.

    Args:
        trainer: the trainer that runs the module.
        pl_module: the module; its ``edits_applied`` is the count if it has such an attribute.

    Returns:
        ``pl_module.edits_applied``, or ``trainer.global_step`` (optimiser steps) for any other module.

    Raises:
        TypeError: if ``edits_applied`` is not a whole number.
    """
    edits = getattr(pl_module, "edits_applied", None)
    if edits is None:
        return trainer.global_step
    if isinstance(edits, torch.Tensor) and edits.numel() == 1 and not edits.is_floating_point():
        edits = edits.item()
    if not isinstance(edits, int) or isinstance(edits, bool):
        raise TypeError(f"{type(pl_module).__name__}.edits_applied should be an int, it is {type(edits).__name__}.")
    return edits


def run_folder(trainer: Trainer) -> Path | None:
    """Where a callback keeps what it measures; None without a logger, unless the trainer was given a folder.

    Lightning takes the working directory then, where runs would write over one another. To be called on every rank:
    the folder is broadcast.
    """
    folder = trainer.log_dir
    if folder is None or (not trainer.loggers and Path(folder).resolve() == Path.cwd()):
        return None
    return Path(folder)


@contextmanager
def as_found(pl_module: LightningModule) -> Iterator[None]:
    """Evaluation mode, no gradients, and a private random state inside; everything as it was afterwards."""
    # `pl_module.train(was_training)` would overwrite the modes of submodules, which may well differ: a frozen backbone
    # stays in evaluation mode while its head trains.
    modes = [(module, module.training) for module in pl_module.modules()]
    pl_module.eval()
    try:
        # A measurement that draws random numbers must not change which numbers training draws after it.
        with torch.no_grad(), isolate_rng():
            yield
    finally:
        for module, training in modes:
            module.training = training


class EveryNEdits(Callback, ABC):
    """Measures something every N edits; a subclass says what, this class says when and logs it.

    A measurement at count ``n`` sees the weights after exactly ``n`` edits. A callback's ``on_train_batch_end`` would
    not: Lightning calls it *before* the module's own, where an editing module writes its update. Measurements are
    therefore taken when the next batch starts, and when training ends.

    A batch may hold several edits. The measurement is taken as soon as the count has reached or crossed a multiple of
    ``every_n`` since the last one: batches of 10 with ``every_n=25`` measure at 0, 30, 50, 80, 100. A list says the
    counts themselves, reached or crossed in the same way: ``[25, 100]`` measures at 30 and 100 then. No count is
    measured twice, also when a run is resumed from a checkpoint.

    Nothing here is about editing: a module without ``edits_applied`` is measured every N optimiser steps
    (``trainer.global_step``). `measure` runs in evaluation mode, without gradients and with a random state of its own,
    so a run gives the same weights with the callback and without.

    The figures go to every logger with the count as step, into ``trainer.callback_metrics`` (where ``ModelCheckpoint``
    finds what it monitors), and are kept in ``latest``. A Lightning ``EarlyStopping`` that monitors one of them checks
    it at once: by itself it would only look at the end of an epoch, which for edits is the end of the run.

    Args:
        every_n: edits between two measurements, or an ascending list of the counts to measure at.
        at_start: also measure before the first edit, the baseline.
        at_end: also measure the last count of the run, whatever it is.

    Raises:
        ValueError: if ``every_n`` is neither a positive whole number nor an ascending list of such.

    Example:
        >>> class LargestWeight(EveryNEdits):
        ...     def measure(self, trainer, pl_module, edits):
        ...         return {"largest_weight": max(p.abs().max().item() for p in pl_module.parameters())}
        >>> LargestWeight(every_n=100).latest
        {}
    """

    def __init__(self, every_n: int | list[int] = 25, at_start: bool = True, at_end: bool = True) -> None:
        super().__init__()
        counts = every_n if isinstance(every_n, list) else [every_n]
        whole = all(isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in counts)
        if not whole or not counts or counts != sorted(set(counts)):
            raise ValueError(
                f"every_n should be a positive whole number, or an ascending list of such; it is {every_n!r}."
            )
        self.every_n = every_n
        self.at_start = at_start
        self.at_end = at_end
        self.latest: dict[str, float] = {}
        self._last_measured: int | None = None

    as_if_finished = True
    """Whether `measure` sees the weights as they would be if the run ended here: within ``pl_module.measuring()``,
    where the module has that."""

    @abstractmethod
    def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
        """Take the figures of the module as it is now.

        Args:
            trainer: the trainer that runs the module.
            pl_module: the module, in evaluation mode. Called on every rank.
            edits: how many edits its weights have seen.

        Returns:
            A figure per tag.
        """

    def weights_replaced(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> None:
        """Told that the weights went back to what they were after ``edits`` edits, between two batches."""

    def measure_again(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures and logs at the latest measured count once more; its figures replace those before.

        Does nothing before the first measurement.
        """
        if self._last_measured is not None:
            self._measure_and_log(trainer, pl_module, count_edits(trainer, pl_module))

    def reset(self) -> None:
        """Forget the previous run. Called before a fit that starts from no edits; extend it to drop more."""
        self.latest = {}
        self._last_measured = None

    @property
    def last_measured(self) -> int | None:
        """The count of the latest measurement; None before the first."""
        return self._last_measured

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Runs before a checkpoint is restored, so this never drops what `load_state_dict` brings back. A second fit
        # that goes on from the weights of the first has a count above zero and keeps its state.
        if stage == "fit" and count_edits(trainer, pl_module) == 0:
            self.reset()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        edits = count_edits(trainer, pl_module)
        first = self._last_measured is None and self.at_start
        if first or self._is_due(edits):
            self._measure_and_log(trainer, pl_module, edits)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        edits = count_edits(trainer, pl_module)
        unseen = self.at_end and edits != self._last_measured
        if unseen or self._is_due(edits):
            self._measure_and_log(trainer, pl_module, edits)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"last_measured": self._last_measured}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_measured = state_dict["last_measured"]

    def counts(self, n_edits: int, batch_size: int) -> list[int]:
        """The counts that a run of ``n_edits`` measures at after its start."""
        found, last = [], 0
        for edits in [*range(batch_size, n_edits, batch_size), n_edits]:
            if self._is_due(edits, last) or (self.at_end and edits == n_edits):
                found.append(edits)
                last = edits
        return found

    def _is_due(self, edits: int, last: int | None = None) -> bool:
        """Whether a count to measure at lies after the last measured one, up to ``edits``."""
        last = (self._last_measured or 0) if last is None else last
        if isinstance(self.every_n, list):
            return any(last < count <= edits for count in self.every_n)
        return edits // self.every_n > last // self.every_n

    def _measure_and_log(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> None:
        measuring = getattr(pl_module, "measuring", nullcontext) if self.as_if_finished else nullcontext
        with as_found(pl_module), measuring():
            figures = {tag: float(value) for tag, value in self.measure(trainer, pl_module, edits).items()}
        self.latest = figures
        self._last_measured = edits
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in figures.items()})
        self._let_stop(trainer, figures)
        if not figures or not trainer.is_global_zero:
            return
        # Not `self.log(on_step=True)`: Lightning would repeat a sparse value at every step until the next one, and
        # against its own step, which stays at zero in a module that has no optimiser.
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=edits)
            logger.save()

    @staticmethod
    def _let_stop(trainer: Trainer, figures: dict[str, float]) -> None:
        """Has those who wait for one of the figures look at it."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping) and callback.monitor in figures:
                callback._run_early_stopping_check(trainer)
