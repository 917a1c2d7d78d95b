"""The progress bar of an editing run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override

from .every_n import EveryNEdits

SHORT = {
    "reliability": "rel",
    "generalization": "gen",
    "locality": "loc",
    "stability/worst_condition_number": "cond",
}


class EditProgressBar(TQDMProgressBar):
    """Shows the edit count, p(target) of the latest edits, and the latest figures of the evaluation callbacks.

    Lightning shows what a module logs in its batch-end hook one batch late; this bar asks the module itself. Every
    evaluation also leaves a line above the bar, so that the course of the run can be read afterwards.
    """

    _said: int | None = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
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
        edits = getattr(pl_module, "edits_applied", None)
        if edits is not None:
            items["edits"] = str(edits)
        last = getattr(pl_module, "last_edits", None)
        if last:
            items["p(target)"] = f"{sum(e.p_target for e in last) / len(last):.2f}"
        latest = {name: value for figures in self._measured(trainer).values() for name, value in figures.items()}
        items.update({short: f"{latest[short]:.3g}" for short in SHORT.values() if short in latest})
        return items
