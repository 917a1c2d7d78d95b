"""General abilities as the run goes on."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lit_edit.evaluation.downstream import load_tasks, run_task
from lit_edit.model.loading import EMBEDDED
from lit_edit.model.prompts import Prompter

from .every_n import EveryNEdits


class DownstreamEval(EveryNEdits):
    """Runs general-ability tasks every N edits and logs ``downstream/<task>``.

    Works in any LightningModule that holds a causal language model of `transformers` as ``model`` and its tokenizer as
    ``tokenizer``.

    Args:
        path: ``embedded`` or a JSON file ``{task: [{"prompt": ..., "answer": ...}, ...]}``.
        tasks: which of its tasks; all if None.
        n_items: the first so many items of each task; all if None, and 0 switches the evaluation off.
        every_n: edits between two evaluations, or an ascending list of the counts to evaluate at.
        at_start: also measure before the first edit.
        at_end: also measure after the last.

    Raises:
        lit_edit.evaluation.downstream.TaskFileError: if the file cannot be used.
    """

    def __init__(
        self,
        path: str = EMBEDDED,
        tasks: list[str] | None = None,
        n_items: int | None = 100,
        every_n: int | list[int] = 25,
        at_start: bool = True,
        at_end: bool = True,
    ) -> None:
        super().__init__(every_n, at_start, at_end)
        if n_items is not None and n_items < 0:
            raise ValueError(f"n_items should not be negative, it is {n_items}.")
        self.tasks = [] if n_items == 0 else load_tasks(path, tasks, n_items)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.tasks and not (hasattr(pl_module, "model") and hasattr(pl_module, "tokenizer")):
            raise TypeError(f"DownstreamEval needs `model` and `tokenizer` in {type(pl_module).__name__}.")

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
        if not self.tasks:
            return {}
        prompter = getattr(pl_module, "prompter", None)  # `LitEdit` knows whether to ask in a chat template
        if not isinstance(prompter, Prompter):
            prompter = Prompter.of(pl_module.model, pl_module.tokenizer)
        return {f"downstream/{task.name}": run_task(pl_module.model, prompter, task)[0] for task in self.tasks}
