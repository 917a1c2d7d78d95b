"""General abilities as the run goes on."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lit_edit.datamodules.tasks import load_abilities
from tqdm import tqdm
from typing_extensions import override

from lit_edit.evaluation.downstream import Task, check_tasks, run_task
from lit_edit.model.loading import EMBEDDED
from lit_edit.model.prompts import Prompter
from lit_edit.requests import RequestError
from lit_edit.runs.results import ResultsLogger
from lit_edit.units import counted

from .every_n import EveryNEdits


class DownstreamEval(EveryNEdits):
    """Runs general-ability tasks every N edits and logs ``downstream/<task>``.

    Works in any LightningModule that holds a causal language model of `transformers` as ``model`` and its tokenizer as
    ``tokenizer``. Tasks that the model is no better at than chance before the first edit are named: their figures say
    nothing of what edits do. ``results.json`` has the items and the chance score of each under ``run.downstream``.

    Args:
        path: ``embedded``, a JSON file ``{task: [{"prompt": ..., "answer": ...}, ...]}``, or a YAML file that describes
            tasks, see `lit_edit.datamodules.tasks`.
        tasks: Names of tasks in that file or of the papers' (``rte``, ``sst2``, ``nq``, ``samsum``, ``gsm8k``,
            ``socialiqa``, ``commonsenseqa``, ``lambada``), or names with the data of each: a file, or
            ``hf:owner/name:config:split``. All of the file if None.
        n_items: Number of items of each task, the first ones; all if None, and 0 switches the evaluation off. On the
            command line so does ``--downstream=null``.
        every_n: Edits between two evaluations, or an ascending list of the counts to evaluate at.
        at_start: Also measure before the first edit.
        at_end: Also measure after the last.
        skip_long: Leave out items that are longer than the model takes, and say how many; an error if not.

    Raises:
        lit_edit.evaluation.downstream.TaskFileError: If a file cannot be used.
    """

    def __init__(
        self,
        path: str = EMBEDDED,
        tasks: list[str] | dict[str, str] | None = None,
        n_items: int | None = 100,
        every_n: int | list[int] = 25,
        at_start: bool = True,
        at_end: bool = True,
        skip_long: bool = False,
    ) -> None:
        super().__init__(every_n, at_start, at_end)
        if n_items is not None and n_items < 0:
            raise ValueError(f"n_items should not be negative, it is {n_items}.")
        self.tasks = [] if n_items == 0 else load_abilities(path, tasks, n_items)
        self.skip_long = skip_long

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.tasks:
            return
        if not (hasattr(pl_module, "model") and hasattr(pl_module, "tokenizer")):
            raise TypeError(f"DownstreamEval needs `model` and `tokenizer` in {type(pl_module).__name__}.")
        prompter = _prompter(pl_module)
        if self.skip_long:
            self.tasks = [self._shortened(trainer, i, prompter) for i in range(len(self.tasks))]
        try:
            check_tasks(self.tasks, prompter)
        except RequestError as error:
            raise RequestError(f"{error} --downstream.skip_long=true leaves such items out.") from None

    def _shortened(self, trainer: Trainer, i: int, prompter: Prompter) -> Task:
        task, reasons = self.tasks[i].fitting(prompter)
        if reasons:
            left = len(task.prompts)
            _say(trainer, f"Task {task.name}: {counted(len(reasons), 'item')} too long for the model, {left} are left.")
            if not left:
                raise RequestError(f"All items of the task {task.name!r} are too long for the model: {reasons[0]}")
        return task

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
        if not self.tasks:
            return {}
        prompter = _prompter(pl_module)
        scores = {task.name: run_task(pl_module.model, prompter, task)[0] for task in self.tasks}
        if not edits and trainer.is_global_zero:
            self._say_what_it_does_not_know(trainer, scores)
        return {f"downstream/{name}": score for name, score in scores.items()}

    def _say_what_it_does_not_know(self, trainer: Trainer, scores: dict[str, float]) -> None:
        about = {
            task.name: {"items": len(task.prompts), "chance": task.chance, "known": task.knows(scores[task.name])}
            for task in self.tasks
        }
        for logger in trainer.loggers:
            if isinstance(logger, ResultsLogger):
                logger.log_run({"downstream": about})
        unknown = [f"{n} ({scores[n]:.2f}, chance {a['chance']:.2f})" for n, a in about.items() if not a["known"]]
        if unknown:
            _say(
                trainer,
                f"No better than chance before the first edit: {', '.join(unknown)}. What edits break does not show "
                "there; name other tasks with --downstream.tasks, or leave all out with --downstream=null.",
            )


def _prompter(pl_module: LightningModule) -> Prompter:
    found = getattr(pl_module, "prompter", None)  # `LitEdit` knows whether to ask in a chat template
    return found if isinstance(found, Prompter) else Prompter.of(pl_module.model, pl_module.tokenizer)


def _say(trainer: Trainer, text: str) -> None:
    """A line above the progress bar, if there is one."""
    if trainer.is_global_zero:
        tqdm.write(text)
