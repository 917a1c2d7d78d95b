"""General-ability tasks: items from a file, answers from greedy generation, one score per task."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_edit.evaluation.metrics import mean_rouge, squad_normalise
from lit_edit.evaluation.scores import greedy
from lit_edit.model.loading import EMBEDDED, embedded_path
from lit_edit.model.prompts import Prompter


class TaskFileError(ValueError):
    """A task file that cannot be used; the message names the file, the task and the item."""


@dataclass(frozen=True)
class Task:
    """One task: prompts, the recorded answers, and how given answers are scored."""

    name: str
    prompts: list[str]
    answers: list[str]

    def score(self, given: Sequence[str]) -> float:
        """Accuracy, exact match after SQuAD's normalisation, or the mean of ROUGE-1, -2 and -L, by the task's kind."""
        return SCORES.get(self.name, _accuracy)(given, self.answers)


def _accuracy(given: Sequence[str], wanted: Sequence[str]) -> float:
    return sum(one == other for one, other in zip(given, wanted, strict=True)) / len(wanted)


def _exact(given: Sequence[str], wanted: Sequence[str]) -> float:
    return sum(squad_normalise(a) == squad_normalise(b) for a, b in zip(given, wanted, strict=True)) / len(wanted)


SCORES: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "inference": _accuracy,
    "sentiment": _accuracy,
    "qa": _exact,
    "summary": mean_rouge,
}


def load_tasks(path: str = EMBEDDED, names: Sequence[str] | None = None, n_items: int | None = None) -> list[Task]:
    """Tasks from a JSON file ``{task: [{"prompt": ..., "answer": ...}, ...]}``.

    Args:
        path: ``embedded`` or a file. Tasks named ``inference`` or ``sentiment`` are scored by accuracy, ``qa`` by exact
            match, ``summary`` by ROUGE, any other by accuracy.
        names: Tasks to run; all if None.
        n_items: Number of items of each task, from the first; all if None.

    Raises:
        TaskFileError: if the file cannot be read or lacks a task or field.
    """
    file = embedded_path("data", "tasks.json") if path == EMBEDDED else Path(path).expanduser()
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TaskFileError(f"The task file {path!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise TaskFileError(f"{path}: an object {{task: [items]}} is needed, not a {type(content).__name__}.")
    tasks = []
    for name in content if names is None else names:
        if name not in content:
            raise TaskFileError(f"{path} has no task {name!r}; it has {', '.join(content)}.")
        if not isinstance(content[name], list):
            raise TaskFileError(f"{path}, task {name!r}: a list of items is needed.")
        items = content[name][:n_items]
        for i, item in enumerate(items):
            for field in ("prompt", "answer"):
                if not isinstance(item, dict) or not isinstance(item.get(field), str) or not item[field].strip():
                    raise TaskFileError(f"{path}, task {name!r}, item {i}, field {field!r}: a text is needed.")
        if not items:
            raise TaskFileError(f"{path}, task {name!r}: there are no items.")
        tasks.append(Task(name, [i["prompt"] for i in items], [i["answer"] for i in items]))
    return tasks


def run_task(model: Any, prompter: Prompter, task: Task) -> tuple[float, list[str]]:
    """(score, the answers given). The model may write as many tokens as the longest recorded answer and a few more.

    Answers end at the end-of-text token or at a line break.
    """
    lengths = []
    for i, (prompt, answer) in enumerate(zip(task.prompts, task.answers, strict=True)):
        row = prompter.row(prompt, answer, source=f"task {task.name!r}, item {i}")
        lengths.append(len(row.ids) - row.target_start)
    limit = max(lengths) + 2
    given = [
        prompter.tokenizer.decode(ids, skip_special_tokens=True).strip().split("\n")[0]
        for ids in greedy(model, prompter, task.prompts, [limit] * len(task.prompts))
    ]
    return task.score(given), given
