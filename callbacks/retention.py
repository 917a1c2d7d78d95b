"""How well all edits so far hold: reliability, generalization and locality as the run goes on."""

from __future__ import annotations

from typing import Any, Protocol, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from typing_extensions import override

from lit_edit.evaluation.scores import LocalityReference, evaluate
from lit_edit.model.prompts import Prompter
from lit_edit.requests import EditRequest

from .every_n import EveryNEdits, as_found


class Editing(Protocol):
    """What `Retention` needs of a module; `LitEdit` has it."""

    model: nn.Module
    tokenizer: Any

    @property
    def prompter(self) -> Prompter:
        """The tokenisation of the model."""

    @property
    def edits_applied(self) -> int:
        """How many edits the weights have seen."""

    @property
    def edited_requests(self) -> list[EditRequest]:
        """Their requests."""


class Retention(EveryNEdits):
    """Scores all edits so far by exact match, every N edits: the *retention* curve.

    ``reliability``: the edit prompt is answered by the new target; ``generalization``: so are its rephrasings;
    ``locality``: out-of-scope prompts still get the answer of the unedited model; ``portability`` where the data have
    it. At 0 edits all requests of the run are asked of the untouched model: the baseline.

    Args:
        every_n: edits between two evaluations, or an ascending list of the counts to evaluate at.
        at_start: also measure the baseline.
        at_end: also measure after the last edit.

    Raises:
        TypeError: at the start of a fit, if the module is not a `LitEdit`: only that has edits to ask for.
    """

    def __init__(self, every_n: int | list[int] = 25, at_start: bool = True, at_end: bool = True) -> None:
        super().__init__(every_n, at_start, at_end)
        self._reference = LocalityReference()

    @override
    def reset(self) -> None:
        super().reset()
        self._reference = LocalityReference()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not hasattr(pl_module, "edited_requests"):
            raise TypeError(f"Retention evaluates edits; {type(pl_module).__name__} makes none (LitEdit does).")
        module = cast(Editing, pl_module)
        requests = self._all_requests(trainer)
        # Now already: if the run is resumed, the model will have been edited when the next hook is called. The answers
        # in the checkpoint count more, but they do not know requests that were added to the data since.
        module.model.to(trainer.strategy.root_device)
        with as_found(pl_module):
            new = self._reference.collect(module.model, module.prompter, requests)
        if new and module.edits_applied:
            rank_zero_warn(
                f"Retention compares {new} locality probes with the model as it is after {module.edits_applied} edits: "
                "their requests were not known when it was unedited.",
                category=UserWarning,
            )

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
        module = cast(Editing, pl_module)
        requests = module.edited_requests if edits else self._all_requests(trainer)
        return evaluate(module.model, module.prompter, requests, self._reference)

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
        self._reference.answers.update(state_dict["reference"])
