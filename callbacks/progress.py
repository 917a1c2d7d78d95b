"""The progress bar of an editing run."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm, convert_inf
from typing_extensions import override

from .every_n import EveryNEdits

SHORT = {
    "reliability": "rel",
    "generalization": "gen",
    "locality": "loc",
    "stability/worst_condition_number": "cond",
}


# Eighty columns hold the count, a bar, the times and four figures.
_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
_IN_BAR = ("rel", "loc", "cond")
_PREPARING = "{desc}{elapsed}"


class EditProgressBar(TQDMProgressBar):
    """Shows how many edits are made, p(target) of the latest, and the latest figures of the evaluation callbacks.

    Lightning shows what a module logs in its batch-end hook one batch late; this bar asks the module itself. Every
    evaluation also leaves a line above the bar, so that the course of the run can be read afterwards.
    """

    _said: int | None = None

    @override
    def init_train_tqdm(self) -> Tqdm:
        return Tqdm(
            desc="preparing: ",
            bar_format=_PREPARING,  # there is nothing to count yet
            position=2 * self.process_position,
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
        )

    @override
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        # Not Lightning's own, which names the epoch.
        self.train_progress_bar.reset(convert_inf(self.total_train_batches))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        bar = self.train_progress_bar
        if not bar.disable and bar.bar_format == _PREPARING:
            bar.bar_format = _FORMAT
            bar.initial = batch_idx  # after resuming, the time that is left follows from what this process has made
            size = getattr(getattr(trainer, "datamodule", None), "batch_size", 1)
            bar.set_description_str("edits" if size == 1 else f"batches of {size}", refresh=False)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        measured = self._measured(trainer)
        edits = max(measured, default=None)
        if edits is not None and measured[edits] and edits != self._said:
            self._said = edits
            figures = "   ".join(f"{name} {value:.3g}" for name, value in measured[edits].items())
            self.print(f"{edits:>6} edits   {figures}")

    @staticmethod
    def _measured(trainer: Trainer) -> dict[int, dict[str, float]]:
        """The latest figures of each callback under their short names, by the count at which they were measured."""
        found: dict[int, dict[str, float]] = {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EveryNEdits) and callback.latest and callback.last_measured is not None:
                for tag, value in callback.latest.items():
                    short = SHORT.get(tag, tag.removeprefix("downstream/") if tag.startswith("downstream/") else None)
                    if short is not None:
                        found.setdefault(callback.last_measured, {})[short] = value
        return found

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        items = dict(super().get_metrics(trainer, pl_module))
        items.pop("v_num", None)
        last = getattr(pl_module, "last_edits", None)
        if last:
            items["p"] = f"{sum(e.p_target for e in last) / len(last):.2f}"
        latest = {name: value for figures in self._measured(trainer).values() for name, value in figures.items()}
        items.update({short: f"{latest[short]:.3g}" for short in _IN_BAR if short in latest})
        return items
