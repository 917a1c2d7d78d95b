"""The progress bar of an editing run."""

from __future__ import annotations

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

    Lightning shows what a module logs in its batch-end hook one batch late; this bar asks the module itself.
    """

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
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EveryNEdits):
                for tag, value in callback.latest.items():
                    if tag in SHORT:
                        items[SHORT[tag]] = f"{value:.3g}"
        return items
