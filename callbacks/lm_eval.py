"""Tasks of EleutherAI's lm-evaluation-harness as the run goes on."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lit_edit.model.loading import on_terminal
from lit_edit.model.prompts import Prompter

from .every_n import EveryNEdits

_SEED = 1234  # of the examples before an item, the harness's own


class LMEval(EveryNEdits):
    """Runs tasks of lm-evaluation-harness every N edits on the model in memory and logs ``lm_eval/<task>/<metric>``.

    Works in any LightningModule that holds a causal language model of `transformers` as ``model`` and its tokenizer as
    ``tokenizer``. Needs the extra ``eval``: ``pip install 'lit-edit[eval]'``. A metric of a filter other than ``none``
    is called ``lm_eval/<task>/<metric>/<filter>``.

    Args:
        tasks: Names of tasks, groups or tags of the harness, or YAML files that describe one each. Such a file may name
            Python functions, which the harness runs: name files that you trust. None switches the evaluation off.
        limit: Number of items of each task, the first ones; all if None.
        num_fewshot: Number of solved examples before each item; as the task says if None.
        batch_size: Number of sequences in a forward pass.
        every_n: Edits between two evaluations, or an ascending list of the counts to evaluate at.
        at_start: Also measure before the first edit.
        at_end: Also measure after the last.

    Raises:
        ValueError: If a number is not positive, a file describes no task, or, when the fit starts, the harness is not
            installed or has no such task.

    Example:
        >>> LMEval(["lambada_openai", "piqa"], limit=100, every_n=25).tasks
        ['lambada_openai', 'piqa']
    """

    def __init__(
        self,
        tasks: list[str] | None = None,
        limit: int | None = None,
        num_fewshot: int | None = None,
        batch_size: int = 8,
        every_n: int | list[int] = 25,
        at_start: bool = True,
        at_end: bool = True,
    ) -> None:
        super().__init__(every_n, at_start, at_end)
        if batch_size < 1 or (limit is not None and limit < 1) or (num_fewshot is not None and num_fewshot < 0):
            raise ValueError("lm_eval needs batch_size >= 1, limit >= 1 and num_fewshot >= 0.")
        self.folders = sorted({str(Path(task).expanduser().parent) for task in tasks or () if _is_file(task)})
        self.tasks = [_named_in(task) if _is_file(task) else task for task in tasks or ()]
        self.limit, self.num_fewshot, self.batch_size = limit, num_fewshot, batch_size
        self._own_only = all(map(_is_file, tasks or ()))
        self._loaded: Any = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.tasks:
            return
        if not (hasattr(pl_module, "model") and hasattr(pl_module, "tokenizer")):
            raise TypeError(f"LMEval needs `model` and `tokenizer` in {type(pl_module).__name__}.")
        try:
            from lm_eval.models.huggingface import HFLM  # noqa: F401  # it needs packages that lm_eval alone does not
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ValueError(
                f"lm-evaluation-harness is not installed ({error}): pip install 'lit-edit[eval]', or leave out "
                "--lm_eval.tasks."
            ) from error
        with _quiet():
            # The harness's own thousands of tasks take seconds to list.
            manager = TaskManager(include_path=self.folders or None, include_defaults=not self._own_only)
            try:
                self._loaded = manager.load(self.tasks)  # data are fetched now, not after hours of editing
            except Exception as error:  # of the harness, or of any library that a task's data take
                why = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(f"lm_eval cannot load {', '.join(self.tasks)}: {why}") from error
            for task in self._loaded["tasks"].values():
                if self.num_fewshot is not None or task.get_config("num_fewshot") is None:
                    task.set_config("num_fewshot", self.num_fewshot or 0)
                task.set_fewshot_seed(_SEED)

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
        if not self.tasks:
            return {}
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        prompter = getattr(pl_module, "prompter", None)
        with _quiet():
            # A copy of the tokenizer: the harness sets its padding.
            model = HFLM(pl_module.model, tokenizer=copy.deepcopy(pl_module.tokenizer), batch_size=self.batch_size)
            found = evaluate(
                model,
                self._loaded,
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=False,
                apply_chat_template=isinstance(prompter, Prompter) and not prompter.frame.special,
            )
        return harness_figures(found["results"] | found.get("groups", {}))


def harness_figures(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Figures by name of what the harness gives for each task; standard errors are left out.

    Example:
        >>> harness_figures({"piqa": {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": 0.1}})
        {'lm_eval/piqa/acc': 0.5}
    """
    figures = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, which = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                figures["/".join(["lm_eval", task, metric] + ([] if which == "none" else [which]))] = float(value)
    return figures


def _is_file(task: str) -> bool:
    return Path(task).suffix.lower() in (".yaml", ".yml")


def _named_in(path: str) -> str:
    """The task that a file of the harness describes."""
    name = None
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        # Not the whole file: it may have tags that only the harness reads.
        name = next((yaml.safe_load(line)["task"] for line in lines if line.startswith("task:")), None)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The task file {path!r} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(name, str):
        raise ValueError(f"{path}: a line `task: name` is needed, as in the harness's own task files.")
    return name


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness says of itself, and without its bars where nobody watches; errors are raised."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with nullcontext() if on_terminal() else redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
