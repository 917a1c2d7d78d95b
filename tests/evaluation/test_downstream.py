"""Task files, and how the answers a model gives are cut and scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import taught

from lit_edit.evaluation import downstream
from lit_edit.evaluation.downstream import Task, TaskFileError, load_tasks, run_task
from lit_edit.model.prompts import Prompter
from lit_edit.requests import RequestError


def written(folder: Path, content: Any) -> str:
    path = folder / "tasks.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def items(*answers: str) -> list[dict[str, str]]:
    return [{"prompt": f"Item {i}:", "answer": answer} for i, answer in enumerate(answers)]


def test_tasks_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, {"qa": items("a", "b", "c"), "summary": items("d"), "own": items("e", "f")})
    assert load_tasks(path) == [
        Task("qa", ["Item 0:", "Item 1:", "Item 2:"], ["a", "b", "c"]),
        Task("summary", ["Item 0:"], ["d"]),
        Task("own", ["Item 0:", "Item 1:"], ["e", "f"]),
    ]
    assert load_tasks(path, ["own", "qa"], 1) == [Task("own", ["Item 0:"], ["e"]), Task("qa", ["Item 0:"], ["a"])]


def test_the_embedded_tasks() -> None:
    tasks = load_tasks(n_items=3)
    assert {"inference", "sentiment", "qa", "summary"} <= {t.name for t in tasks}
    assert all(len(t.prompts) == len(t.answers) == 3 for t in tasks)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"task file '.*tasks\.json' cannot be read"),
        ([], r"tasks\.json: an object .* is needed, not a list"),
        ({"qa": items("a")}, r"tasks\.json has no task 'own'; it has qa\."),
        ({"own": []}, r"tasks\.json, task 'own': there are no items\."),
        ({"own": {"prompt": "a"}}, r"tasks\.json, task 'own': a list of items is needed"),
        ({"own": [*items("a"), {"prompt": "b"}]}, r"tasks\.json, task 'own', item 1, field 'answer': a text"),
        ({"own": [{"prompt": " ", "answer": "b"}]}, r"tasks\.json, task 'own', item 0, field 'prompt': a text"),
        ({"own": ["a"]}, r"tasks\.json, task 'own', item 0, field 'prompt': a text"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(TaskFileError, match=message):
        load_tasks(written(tmp_path, content), ["own"])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TaskFileError, match=r"'nowhere\.json' cannot be read"):
        load_tasks("nowhere.json")


@pytest.mark.parametrize(
    ("name", "given", "score"),
    [
        ("sentiment", ["positive", "negative"], 0.5),
        ("inference", ["Positive", "positive"], 0.5),  # a label is to be given to the letter
        ("anything", ["positive", "positive"], 1.0),
        ("qa", ["the positive!", "a negative"], 0.5),  # SQuAD: articles and punctuation do not count
        ("summary", ["positive", "wrong"], 1 / 3),  # one word has no pair of words: ROUGE-2 is 0
    ],
)
def test_scores(name: str, given: list[str], score: float) -> None:
    assert Task(name, ["p", "q"], ["positive", "positive"]).score(given) == pytest.approx(score)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_answers_end_at_the_end_of_the_text_a_line_break_or_the_limit(
    tiny_folder: Callable[[str], Path], family: str
) -> None:
    model, tokenizer = taught(tiny_folder(family))
    prompter = Prompter(tokenizer, 128)
    capitals = Task("own", ["The capital of Peru is", "The capital of France is"], ["Lima.", "Lille."])
    assert run_task(model, prompter, capitals) == (0.5, ["Lima.", "Lyon."])
    # Room for more than a line: the model goes on with the next question.
    snow = Task("own", ["Question: is snow cold? Answer:"], ["yes and then some more words"])
    assert run_task(model, prompter, snow) == (0.0, ["yes"])
    # Two tokens more than the longest recorded answer.
    _, (given,) = run_task(model, prompter, Task("own", ["The river of Peru"], ["r"]))
    full = " runs slowly to the sea."
    assert full.strip().startswith(given)
    assert given != full.strip()
    assert len(tokenizer(f" {given}")["input_ids"]) == 2 + len(tokenizer(" r")["input_ids"])


def test_an_item_that_is_too_long_is_named(tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(downstream, "greedy", lambda *args: asked.append(args))
    task = Task("own", ["short", "so " * 200], ["a", "b"])
    model, tokenizer = taught(tiny_folder("llama"), steps=0)
    with pytest.raises(RequestError, match=r"task 'own', item 1.*\d+ tokens"):
        run_task(model, Prompter(tokenizer, 128), task)
    assert not asked
