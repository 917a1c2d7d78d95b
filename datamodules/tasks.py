"""General abilities from files of any form: a task is described in YAML, its items are records of a file.

A description says where the records are, what of them makes a prompt, which answer is right, and how a model's answer
is found and judged::

    trivia:
      data: trivia.jsonl            # a file, beside the YAML unless its path is absolute, or hf:owner/name:config:split
      fields:                       # names for parts of a record; every field of a record has its own name already
        hint: [hints.0, note]       # the first of these that a record has
        start: text | first_line    # a part of a field, see `FUNCTIONS`
      prompt: "{hint} {question}"   # what the model continues; after a space comes its answer
      answer: answers               # where the right answer is; a list has all that are accepted
      labels: {"0": "no", "1": "yes"}  # what answers on record are called in the prompt's words
      metric: accuracy              # and extract, choose, max_new_tokens, stop: see `lit_edit.evaluation.downstream`
      choices: [options, [a, b]]    # with `choose`: where they are, in a list or in several fields; {A}, {B} in prompts
      score: letters                # and what of them is compared: their letters or their `texts`
      shots: 2                      # solved examples before each prompt, the first records of `examples`
      examples: train.jsonl
      shown: explanation            # what an example shows as its answer; the answer if left out
      base: rte                     # everything that is not said here is as there

`tasks.yaml` has those of the papers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

import yaml
from lit_edit.datamodules.files import HUB_PREFIX, read_records

from lit_edit.evaluation.answers import number
from lit_edit.evaluation.downstream import Judging, Task, TaskFileError, load_tasks, read_items
from lit_edit.model.loading import EMBEDDED
from lit_edit.requests import RequestError, refusal

_LABELS = "-labels.lst"  # SocialIQA's: the labels of `dev.jsonl` stand in `dev-labels.lst`
_PLACE = re.compile(r"\{(\w+)\}")
FUNCTIONS: dict[str, Callable[[str], str]] = {
    "first_line": lambda text: text.strip().split("\n")[0],
    "last_word": lambda text: text.split()[-1],
    "number": number,
    "without_last_word": lambda text: text.rstrip()[: -len(text.split()[-1])].rstrip(),
}
"""What may stand behind ``|``: from a field's text to a part of it."""


@dataclass(frozen=True)
class Description:
    """A task as data; the fields are explained above."""

    name: str
    prompt: str
    answer: tuple[str, ...]
    data: str
    judging: Judging
    about: str = ""
    fields: tuple[tuple[str, tuple[str, ...]], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    choices: tuple[tuple[str, ...], ...] = ()
    score: Literal["letters", "texts"] = "texts"
    shots: int = 0
    examples: str = ""
    shown: tuple[str, ...] = ()

    def task(self, n_items: int | None = None) -> Task:
        """Reads the data.

        Args:
            n_items: Number of items, the first ones; all if None.

        Raises:
            TaskFileError: If it cannot be read, or a record lacks a part; the message names file and record.
        """
        before = self._shots()
        prompts, answers, accepted, choices = [], [], [], []
        for source, record in self._records(self.data, n_items):
            item = self._item(source, record)
            prompts.append(before + item.prompt)
            answers.append(item.accepted[0])
            accepted.append(item.accepted)
            choices.append(item.choices)
        scored = choices if self.judging.choose else []
        return Task(self.name, prompts, answers, self.judging, accepted, scored)

    def _shots(self) -> str:
        if not self.shots:
            return ""
        found = self._records(self.examples, self.shots)
        if len(found) < self.shots:
            raise TaskFileError(f"task {self.name!r}: {self.examples} has {len(found)} records for {self.shots} shots.")
        items = [self._item(source, record) for source, record in found]
        return "".join(f"{item.prompt} {item.shown}\n\n" for item in items)

    def _records(self, path: str, n: int | None) -> list[tuple[str, Mapping[str, Any]]]:
        try:
            found = read_records(path if path.startswith(HUB_PREFIX) else Path(path))[:n]
        except RequestError as error:
            raise TaskFileError(f"task {self.name!r}: {error}") from error
        bad = [str(record) for _, record in found if isinstance(record, RequestError)]
        if bad:
            raise TaskFileError(f"task {self.name!r}: {refusal(bad, len(found))}")
        records = [(source, record) for source, record in found if not isinstance(record, RequestError)]
        labels = Path(path.removesuffix(".jsonl") + _LABELS).expanduser()
        if path.endswith(".jsonl") and labels.is_file():
            lines = labels.read_text(encoding="utf-8").split()[: len(records)]
            if len(lines) < len(records):
                raise TaskFileError(f"task {self.name!r}: {labels} has {len(lines)} labels for {len(records)} records.")
            records = [
                (source, {**record, "label": line}) for (source, record), line in zip(records, lines, strict=True)
            ]
        return records

    def _item(self, source: str, record: Mapping[str, Any]) -> _Item:
        where = f"task {self.name!r}, {source}"
        options = self._options(record, where)
        parts: dict[str, Any] = {**record, **dict(zip(ascii_uppercase, options, strict=False))}
        parts |= {name: _found(record, paths, where) for name, paths in self.fields}

        def part(match: re.Match[str]) -> str:
            value = parts.get(match[1])
            if not isinstance(value, (str, int, float)) or isinstance(value, bool):
                raise TaskFileError(f"{where}: the prompt needs a text {match[1]!r}; there are {', '.join(parts)}.")
            return str(value).strip().replace("\r\n", "\n")

        prompt = _PLACE.sub(part, self.prompt)
        raw = _found(record, self.answer, where)
        given = [text for text in map(_text, raw if isinstance(raw, (list, tuple)) else [raw]) if text]
        right = tuple(dict(self.labels).get(text, text) for text in given)
        if self.labels and not options:
            unknown = next((text for text in right if text not in dict(self.labels).values()), None)
            if unknown is not None:
                raise TaskFileError(f"{where}: the answer {unknown!r} is none of {', '.join(dict(self.labels))}.")
        if not right:
            raise TaskFileError(f"{where}: there is no answer in {' or '.join(self.answer)}.")
        letters = tuple(ascii_uppercase[: len(options)])
        if options:
            place = [letters.index(x) if x in letters else options.index(x) if x in options else -1 for x in right]
            if min(place) < 0:
                raise TaskFileError(f"{where}: the answer {right[0]!r} is none of the choices {', '.join(options)}.")
            options = letters if self.score == "letters" else options
            right = tuple(options[i] for i in place)
        shown = _text(_found(record, self.shown, where)) if self.shown else right[0]
        return _Item(prompt, right, options, shown)

    def _options(self, record: Mapping[str, Any], where: str) -> tuple[str, ...]:
        for paths in self.choices:
            found = [_look(record, path) for path in paths]
            if len(paths) == 1 and isinstance(found[0], (list, tuple)):
                found = list(found[0])
            texts = tuple(_text(one) for one in found if one is not None)
            if texts and len(texts) == len(found) and all(texts):
                return texts
        if self.choices:
            raise TaskFileError(f"{where}: there are no choices; the record has {', '.join(map(str, record))}.")
        return ()


@dataclass(frozen=True)
class _Item:
    prompt: str
    accepted: tuple[str, ...]
    choices: tuple[str, ...]
    shown: str


def _look(record: Any, path: str) -> Any:
    """What is at a path like ``question.choices.*.text``; None if nothing is."""
    value: Any = record
    steps = path.split(".")
    for i, step in enumerate(steps):
        if step == "*":
            if not isinstance(value, (list, tuple)):
                return None
            below = [_look(one, ".".join(steps[i + 1 :])) for one in value]
            return None if any(one is None for one in below) else below
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, (list, tuple)) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _found(record: Mapping[str, Any], paths: Sequence[str], where: str) -> Any:
    """What is at the first of some paths that a record has, put through the functions behind it."""
    for path in paths:
        place, *functions = (part.strip() for part in path.split("|"))
        value = _look(record, place)
        if value is None or value == "":
            continue
        for name in functions:
            if not isinstance(value, str) or not value.strip():
                raise TaskFileError(f"{where}, field {place!r}: a text is needed for {name}.")
            value = FUNCTIONS[name](value)
        return value
    raise TaskFileError(f"{where}: there is no {' or '.join(paths)}; the record has {', '.join(map(str, record))}.")


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def descriptions(path: str | Path | None = None) -> dict[str, Description]:
    """The tasks that a YAML file describes.

    Args:
        path: The file; the papers' tasks if None.

    Raises:
        TaskFileError: If it cannot be used; the message names the task and the setting.
    """
    file = Path(__file__).with_name("tasks.yaml") if path is None else Path(path).expanduser()
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TaskFileError(f"The task file {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise TaskFileError(f"{file}: tasks by name are needed, each a mapping.")
    for name, settings in content.items():
        if not isinstance(settings, dict):
            raise TaskFileError(f"{file}, task {name!r}: a mapping is needed, such as `prompt:` and `answer:`.")
        for key in ("data", "examples"):  # beside the file that names them
            at = settings.get(key)
            if isinstance(at, str) and not at.startswith(HUB_PREFIX):
                settings[key] = str(file.parent / Path(at).expanduser())
    papers = {} if path is None else _papers()

    def whole(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
        """The settings of a task with those it is built on: another of the file, or one of the papers."""
        settings = dict(content[name] if name in content and name not in above else papers[name])
        base = settings.pop("base", None)
        if base is None:
            return settings
        if base not in (content if base not in (name, *above) else {}) and base not in papers:
            there = ", ".join({**papers, **content})
            raise TaskFileError(f"{file}, task {name!r}: there is no task {base!r} to build on; {there}.")
        return {**whole(base, (name, *above)), **settings}

    found = {str(name): whole(name) for name in content}
    return {name: _description(name, settings, str(file)) for name, settings in found.items()}


def _papers() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("tasks.yaml").read_text(encoding="utf-8"))
    return content


_JUDGING = {field.name for field in fields(Judging)} - {"labels"}
_LISTS = ("answer", "shown")


def _description(name: str, settings: Mapping[str, Any], file: str) -> Description:
    where = f"{file}, task {name!r}"
    known = {field.name for field in fields(Description)} - {"name", "judging"} | _JUDGING
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise TaskFileError(f"{where}: there is no setting {unknown[0]!r}; there are base, {', '.join(sorted(known))}.")
    for key in ("prompt", "answer", "data"):
        if not settings.get(key):
            raise TaskFileError(f"{where}: {key!r} is missing.")
    own = dict(settings)
    judged = {key: own.pop(key) for key in list(own) if key in _JUDGING}
    if "stop" in judged:
        judged["stop"] = _several(judged["stop"])
    labels = tuple((str(key), str(value)) for key, value in (own.pop("labels", None) or {}).items())
    choices = tuple(_several(one) for one in own.pop("choices", None) or ())
    named = tuple((str(key), _several(value)) for key, value in (own.pop("fields", None) or {}).items())
    try:
        judging = Judging(labels=tuple(dict.fromkeys(value for _, value in labels)), **judged)
        for key in _LISTS:
            if key in own:
                own[key] = _several(own[key])
        made = Description(name, judging=judging, labels=labels, choices=choices, fields=named, **own)
    except (TypeError, ValueError) as error:
        raise TaskFileError(f"{where}: {error}") from error
    functions = [part.strip() for path in _paths(made) for part in path.split("|")[1:]]
    wrong = next((one for one in functions if one not in FUNCTIONS), None)
    if wrong is not None:
        raise TaskFileError(f"{where}: there is no function {wrong!r}; there are {', '.join(FUNCTIONS)}.")
    if judging.choose and not choices:
        raise TaskFileError(f"{where}: `choose` needs `choices`.")
    if made.score not in ("letters", "texts"):
        raise TaskFileError(f"{where}: score is {made.score!r}; it can be letters or texts.")
    if not isinstance(made.shots, int) or made.shots < 0 or (made.shots and not made.examples):
        raise TaskFileError(f"{where}: `shots` is a number of examples, and needs `examples`, the data they are from.")
    return made


def _paths(made: Description) -> list[str]:
    return [*made.answer, *made.shown, *(path for _, paths in made.fields for path in paths)]


def _several(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else (str(value),)


def load_abilities(
    path: str = EMBEDDED, tasks: Sequence[str] | Mapping[str, str] | None = None, n_items: int | None = None
) -> list[Task]:
    """Tasks of a file, and of the papers.

    Args:
        path: ``embedded``, a JSON file of items (see `load_tasks`), or a YAML file of descriptions.
        tasks: Names: of the file's tasks, or of the papers' (``rte``, ``sst2``, ``nq``, ``samsum``, ``gsm8k``,
            ``socialiqa``, ``commonsenseqa``, ``lambada``), which are fetched from the Hugging Face hub; or names with
            the data of each, a file or ``hf:owner/name:config:split``. All of the file if None.
        n_items: Number of items of each, the first ones; all if None.

    Raises:
        TaskFileError: If there is no such task, or its data cannot be used.
    """
    described = Path(path).suffix.lower() in (".yaml", ".yml") and path != EMBEDDED
    forms = descriptions(path) if described else {}
    items = {} if described else read_items(path)
    if tasks is None:
        return [form.task(n_items) for form in forms.values()] if described else load_tasks(path, None, n_items)
    forms = {**descriptions(), **forms}
    found = []
    for name in tasks:
        data = tasks[name] if isinstance(tasks, Mapping) else None
        if name in items and data is None:
            found += load_tasks(path, [name], n_items)
        elif name in forms:
            found.append((replace(forms[name], data=data) if data else forms[name]).task(n_items))
        else:
            there = "" if described else f"; it has {', '.join(items)}"
            raise TaskFileError(f"{path} has no task {name!r}{there}. Described are {', '.join(forms)}.")
    return found
