"""General abilities: tasks of prompts and answers, how a model answers them, and one score per task."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lit_edit.evaluation.answers import EXTRACTS, Extract, comparable, cut, extracted
from lit_edit.evaluation.metrics import mean_rouge, squad_f1, squad_normalise
from lit_edit.evaluation.scores import greedy, score_targets
from lit_edit.model.loading import EMBEDDED, embedded_path
from lit_edit.model.prompts import Prompter
from lit_edit.requests import RequestError, refusal

Metric = Literal["identical", "accuracy", "exact_match", "f1", "rouge"]
"""How answers are judged.

``identical``: the same text. ``accuracy``: the same but for case and punctuation around it. ``exact_match`` and ``f1``:
SQuAD's, after its normalisation. ``rouge``: the mean of ROUGE-1, -2 and -L. Of several accepted answers the best counts
(``rouge``: the first).
"""
METRICS: tuple[Metric, ...] = get_args(Metric)
Choose = Literal["sum", "token"]
"""How choices are compared: by the log-likelihood of the whole text, or by its mean over tokens."""
_SPARE = 2  # tokens beyond the longest recorded answer that an answer may have
_ONE_SIDED = 1.645  # standard deviations: 95 % of what guessing scores lies below


class TaskFileError(ValueError):
    """A task file that cannot be used; the message names the file, the task and the item."""


@dataclass(frozen=True)
class Judging:
    """How a model's answers come about and are judged.

    Args:
        metric: See `Metric`.
        extract: Part of a continuation that is the answer, see `lit_edit.evaluation.answers.Extract`.
        labels: All labels of the task, for ``extract: label``.
        choose: Instead of a continuation take the likeliest of an item's choices, see `Choose`.
        max_new_tokens: Length of a continuation; the longest recorded answer and two tokens more if None.
        stop: Texts that end a continuation.

    Raises:
        ValueError: For an unknown metric, way to extract or to choose, or ``label`` without labels.
    """

    metric: Metric = "accuracy"
    extract: Extract = "line"
    labels: tuple[str, ...] = ()
    choose: Choose | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ("\n",)

    def __post_init__(self) -> None:
        for name, known in (("metric", METRICS), ("extract", EXTRACTS), ("choose", (None, *get_args(Choose)))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it can be {', '.join(map(str, known))}.")
        if self.extract == "label" and not self.labels:
            raise ValueError("extract: label needs the labels of the task.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be positive.")


_KINDS = {
    "inference": Judging("identical"),
    "sentiment": Judging("identical"),
    "qa": Judging("exact_match"),
    "summary": Judging("rouge"),
}


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: For figures: ``downstream/<name>``.
        prompts: What the model continues.
        answers: The recorded answer of each.
        judging: How answers come about and are judged; by the name if None, as in the embedded tasks: ``inference`` and
            ``sentiment`` to the letter, ``qa`` by exact match, ``summary`` by ROUGE, others to the letter.
        accepted: All answers that are right, for each prompt; ``answers`` alone if empty.
        choices: What to choose from, for each prompt, where `Judging.choose` says so.
    """

    name: str
    prompts: list[str]
    answers: list[str]
    judging: Judging | None = None
    accepted: list[tuple[str, ...]] = field(default_factory=list)
    choices: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def how(self) -> Judging:
        """How answers come about and are judged."""
        return _KINDS.get(self.name, Judging("identical")) if self.judging is None else self.judging

    @property
    def right(self) -> list[tuple[str, ...]]:
        """The answers that are right, for each prompt."""
        return self.accepted or [(answer,) for answer in self.answers]

    def score(self, given: Sequence[str]) -> float:
        """The mean score of answers, between 0 and 1.

        Args:
            given: An answer for each prompt, as `run_task` extracts them.

        Raises:
            ValueError: If there is not one for each prompt.
        """
        metric = self.how.metric
        if metric == "rouge":
            return mean_rouge(given, [right[0] for right in self.right])
        pairs = list(zip(given, self.right, strict=True))
        if metric == "f1":
            return sum(squad_f1(one, right) for one, right in pairs) / len(pairs)
        plain = {"accuracy": comparable, "exact_match": squad_normalise}.get(metric, str)
        return sum(plain(one) in {plain(other) for other in right} for one, right in pairs) / len(pairs)

    @property
    def chance(self) -> float:
        """What an answer scores that knows nothing of its question.

        The best of: always the same recorded answer; for choices, any of them; for texts, another item's answer.
        """
        metric = self.how.metric
        if metric in ("rouge", "f1"):
            return self.score([*self.answers[1:], self.answers[0]]) if len(self.answers) > 1 else 0.0
        plain = {"accuracy": comparable, "exact_match": squad_normalise}.get(metric, str)
        common = Counter(one for right in self.right for one in {plain(answer) for answer in right})
        constant = common.most_common(1)[0][1] / len(self.prompts)
        guess = sum(1 / len(options) for options in self.choices) / len(self.choices) if self.choices else 0.0
        return max(constant, guess)

    def knows(self, score: float) -> bool:
        """Whether a score is better than chance, beyond what luck explains (one-sided, 95 %).

        With so few items that no score could tell, it counts as known.
        """
        chance, n = self.chance, len(self.prompts)
        bound = chance + _ONE_SIDED * (chance * (1 - chance) / n) ** 0.5
        return bound >= 1 or score > bound

    def fitting(self, prompter: Prompter) -> tuple[Task, list[RequestError]]:
        """The items that a model takes, and for each other one why not.

        Args:
            prompter: Tokenisation of the model.
        """
        kept, reasons = [], []
        for i, prompt in enumerate(self.prompts):
            room = 0 if self.how.choose else self.how.max_new_tokens or 0
            try:
                for text in self._texts(i):
                    row = prompter.row(
                        prompt, text, source=f"task {self.name!r}, item {i}", fields=("prompt", "answer")
                    )
                    if row.target_start + room > prompter.max_length:
                        raise RequestError(
                            f"task {self.name!r}, item {i}, field 'prompt': {row.target_start} tokens and {room} for "
                            f"the answer, the model takes {prompter.max_length}."
                        )
            except RequestError as error:
                reasons.append(error)
            else:
                kept.append(i)
        if not reasons:
            return self, []

        def left(values: list[Any]) -> list[Any]:
            return [values[i] for i in kept] if values else []

        fits = replace(
            self,
            prompts=left(self.prompts),
            answers=left(self.answers),
            accepted=left(self.accepted),
            choices=left(self.choices),
        )
        return fits, reasons

    def _texts(self, i: int) -> tuple[str, ...]:
        """What may follow a prompt."""
        if self.how.choose:
            return self.choices[i]
        return ("",) if self.how.max_new_tokens else (self.answers[i],)


def read_items(path: str) -> dict[str, Any]:
    """The content of a JSON file ``{task: [{"prompt": ..., "answer": ...}, ...]}``.

    Args:
        path: ``embedded`` or a file.

    Raises:
        TaskFileError: If it cannot be read or is no object.
    """
    file = embedded_path("data", "tasks.json") if path == EMBEDDED else Path(path).expanduser()
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TaskFileError(f"The task file {path!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise TaskFileError(f"{path}: an object {{task: [items]}} is needed, not a {type(content).__name__}.")
    return content


def load_tasks(path: str = EMBEDDED, names: Sequence[str] | None = None, n_items: int | None = None) -> list[Task]:
    """Tasks from a JSON file ``{task: [{"prompt": ..., "answer": ...}, ...]}``.

    Args:
        path: ``embedded`` or a file. Tasks named ``qa`` are scored by exact match, ``summary`` by ROUGE, any other by
            accuracy, for which in a file of one's own neither case nor punctuation around an answer counts.
        names: Tasks to take; all if None.
        n_items: Number of items of each, the first ones; all if None.

    Raises:
        TaskFileError: If the file cannot be read or lacks a task or field.
    """
    content = read_items(path)
    tasks = []
    for name in content if names is None else names:
        if name not in content:
            raise TaskFileError(f"{path} has no task {name!r}; it has {', '.join(content)}.")
        if not isinstance(content[name], list):
            raise TaskFileError(f"{path}, task {name!r}: a list of items is needed.")
        items = content[name][:n_items]
        for i, item in enumerate(items):
            for key in ("prompt", "answer"):
                if not isinstance(item, dict) or not isinstance(item.get(key), str) or not item[key].strip():
                    raise TaskFileError(f"{path}, task {name!r}, item {i}, field {key!r}: a text is needed.")
        if not items:
            raise TaskFileError(f"{path}, task {name!r}: there are no items.")
        lenient = path != EMBEDDED and _KINDS.get(name, Judging("identical")).metric == "identical"
        judging = Judging("accuracy") if lenient else None
        tasks.append(Task(name, [i["prompt"] for i in items], [i["answer"] for i in items], judging))
    return tasks


def check_tasks(tasks: Sequence[Task], prompter: Prompter) -> None:
    """Finds items that do not fit a model, before any is asked.

    Raises:
        RequestError: Naming all of them.
    """
    reasons = [str(error) for task in tasks for error in task.fitting(prompter)[1]]
    if reasons:
        raise refusal(reasons, sum(len(task.prompts) for task in tasks))


@torch.no_grad()
def run_task(model: Any, prompter: Prompter, task: Task) -> tuple[float, list[str]]:
    """Asks a model everything.

    Args:
        model: A causal language model of `transformers`.
        prompter: Its tokenisation.
        task: What to ask.

    Returns:
        The score, and the answer extracted from each continuation, or chosen.

    Raises:
        RequestError: If an item is longer than the model takes.
    """
    how = task.how
    if how.choose:
        given = _chosen(model, prompter, task)
        return task.score(given), given
    check_tasks([task], prompter)
    decode = prompter.tokenizer.decode
    most = how.max_new_tokens
    if most is None:
        rows = [prompter.row(prompt, answer) for prompt, answer in zip(task.prompts, task.answers, strict=True)]
        most = max(len(row.ids) - row.target_start for row in rows) + _SPARE
    room = [min(most, prompter.max_length - len(prompter.row(prompt).ids)) for prompt in task.prompts]

    def ended(ids: list[int]) -> bool:
        text = decode(ids, skip_special_tokens=True)
        return len(cut(text, how.stop)) < len(cut(text, ()))

    said = [decode(ids, skip_special_tokens=True) for ids in greedy(model, prompter, task.prompts, room, ended)]
    if task.judging is None:  # the embedded tasks: the first line as it is
        given = [text.strip().split("\n")[0] for text in said]
    else:
        given = [extracted(cut(text, how.stop), how.extract, how.labels) for text in said]
    return task.score(given), given


def _chosen(model: Any, prompter: Prompter, task: Task) -> list[str]:
    """The likeliest choice of each item; the first of those that are equally likely."""
    rows = [
        prompter.row(prompt, choice, source=f"task {task.name!r}, item {i}", fields=("prompt", "choices"))
        for i, (prompt, choices) in enumerate(zip(task.prompts, task.choices, strict=True))
        for choice in choices
    ]
    scores = score_targets(model, prompter, rows)
    values = iter((scores.log_prob if task.how.choose == "sum" else scores.mean_log_prob).tolist())
    given = []
    for choices in task.choices:
        likely = [next(values) for _ in choices]
        given.append(choices[likely.index(max(likely))])
    return given
