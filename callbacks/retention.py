"""How well all edits so far hold: reliability, generalization and locality as the run goes on."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lit_edit.evaluation import LocalityReference, evaluate
from lit_edit.requests import EditRequest

from .every_n import EveryNEdits


class Retention(EveryNEdits):
    """Scores all edits so far by exact match, every N edits: the *retention* curve.

    ``reliability``: the edit prompt is answered by the new target; ``generalization``: so are its rephrasings;
    ``locality``: out-of-scope prompts still get the answer of the unedited model; ``portability`` where the data have
    it. At 0 edits all requests of the run are asked of the untouched model: the baseline.

    Args:
        every_n: edits between two evaluations.
        at_start: also measure the baseline.
        at_end: also measure after the last edit.

    Raises:
        TypeError: at the start of a fit, if the module is not a `LitEdit`: only that has edits to ask for.
    """

    def __init__(self, every_n: int = 25, at_start: bool = True, at_end: bool = True) -> None:
        super().__init__(every_n, at_start, at_end)
        self._reference = LocalityReference()

    @override
    def reset(self) -> None:
        super().reset()
        self._reference = LocalityReference()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not hasattr(pl_module, "edited_requests"):
            raise TypeError(f"Retention evaluates edits; {type(pl_module).__name__} makes none (LitEdit does).")
        # A resumed run has its references from the checkpoint: here the model may already be edited.
        if pl_module.edits_applied == 0:
            requests = self._all_requests(trainer)
            self._reference.collect(pl_module.model, pl_module.session.workspace.prompter, requests)

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
        requests = pl_module.edited_requests if edits else self._all_requests(trainer)
        if not requests:
            return {}
        return evaluate(pl_module.model, pl_module.session.workspace.prompter, requests, self._reference)

    @staticmethod
    def _all_requests(trainer: Trainer) -> list[EditRequest]:
        requests: list[EditRequest] = list(getattr(getattr(trainer, "datamodule", None), "requests", []))
        if not requests:
            raise TypeError("Retention needs a data module that offers `requests`, as those of lit_edit do.")
        return requests

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "reference": self._reference.answers}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._reference.answers = dict(state_dict["reference"])
