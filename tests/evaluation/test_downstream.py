"""Task files, and how the answers a model gives are cut and scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import taught

from lit_edit.evaluation import downstream
from lit_edit.evaluation.downstream import Judging, Task, TaskFileError, load_tasks, run_task
from lit_edit.model.prompts import Prompter
from lit_edit.requests import RequestError


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def learnt(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> tuple[Any, Any]:
    return taught(tiny_folder(request.param))


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
        Task("own", ["Item 0:", "Item 1:"], ["e", "f"], Judging("accuracy")),
    ]
    assert [task.prompts for task in load_tasks(path, ["own", "qa"], 1)] == [["Item 0:"], ["Item 0:"]]


def test_in_a_file_of_ones_own_punctuation_and_case_do_not_count(tmp_path: Path) -> None:
    (task,) = load_tasks(written(tmp_path, {"inference": items("True", "False", "True")}))
    assert task.score(["True.", " false", "No"]) == pytest.approx(2 / 3)
    (embedded,) = load_tasks(names=["inference"], n_items=1)
    assert embedded.score([f"{embedded.answers[0]}."]) == 0  # the embedded model's scores are to the letter


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


RIGHT = Judging("accuracy", "label", ("True", "False"))


@pytest.mark.parametrize(
    ("judging", "accepted", "given", "score"),
    [
        (Judging("accuracy"), [("True",), ("Oslo",)], ["true.", "Bergen"], 0.5),
        (Judging("accuracy"), [("18",), ("a", "b")], ["18", "B!"], 1.0),
        (Judging("identical"), [("True",), ("x",)], ["True.", "x"], 0.5),
        (Judging("exact_match"), [("The cat", "dog"), ("x",)], ["a dog.", "y"], 0.5),
        (Judging("f1"), [("a dog", "cat"), ("red fox",)], ["the big dog", "fox"], (2 / 3 + 2 / 3) / 2),
        # ROUGE-1 and -L: 2 of 3 and 2 of 2 words, 4/5; ROUGE-2: 1 of 2 and 1 of 1 pairs, 2/3.
        (Judging("rouge"), [("they meet",), ("one two",)], ["they meet today", "three"], (4 / 5 + 4 / 5 + 2 / 3) / 6),
    ],
)
def test_scores_by_hand(judging: Judging, accepted: list[tuple[str, ...]], given: list[str], score: float) -> None:
    task = Task("own", ["p", "q"], [right[0] for right in accepted], judging, accepted)
    assert task.score(given) == pytest.approx(score, abs=1e-6)
    with pytest.raises(ValueError, match=r"argument 2 is longer|2 gold answers"):
        task.score(given[:1])


def test_chance_by_hand() -> None:
    labels = ["True", "True", "True.", "False"]
    assert Task("own", list("pqrs"), labels, RIGHT).chance == 0.75  # always "True"
    several = Task("own", ["p", "q"], ["a", "b"], Judging("exact_match"), [("a", "c", "The a"), ("c", "b")])
    assert several.chance == 1.0  # "c" is right for both
    letters = [("A", "B"), ("A", "B", "C")]
    chosen = Task("own", ["p", "q"], ["A", "B"], Judging(choose="sum"), [], letters)
    assert chosen.chance == 0.5  # always "A"; guessing would give (1/2 + 1/3) / 2
    chosen = Task("own", list("pqr"), ["A", "B", "C"], Judging(choose="sum"), [], [("A", "B")] * 3)
    assert chosen.chance == 0.5  # guessing; always the same would give 1/3
    texts = Task("own", ["p", "q"], ["they meet", "they part"], Judging("rouge"))
    assert texts.chance == pytest.approx((1 / 2 + 1 / 2 + 0) / 3, abs=1e-6)  # the other's summary


def test_what_a_model_knows() -> None:
    """Of 100 items with two labels guessing gets 50 and rarely more than 58: 50 + 1.645 · 5."""
    task = Task("own", ["p"] * 100, ["True", "False"] * 50, RIGHT)
    assert [task.knows(score) for score in (0.4, 0.5, 0.58, 0.59, 1.0)] == [False, False, False, True, True]
    assert not Task("own", ["p"] * 100, [str(i) for i in range(100)]).knows(0.0)
    assert Task("own", ["p"] * 2, ["a", "b"], Judging("exact_match")).knows(0.0)  # two items cannot tell
    with pytest.raises(ValueError, match="metric is 'best'; it can be identical"):
        Judging("best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the labels"):
        Judging(extract="label")
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        Judging(max_new_tokens=0)


def test_a_model_that_explains_itself_is_scored_by_its_answer(learnt: tuple[Any, Any]) -> None:
    model, tokenizer = learnt
    prompter = Prompter(tokenizer, 128)
    judging = Judging("accuracy", "label", ("Yes", "No"), max_new_tokens=8)
    assert run_task(model, prompter, Task("own", ["Question: is snow cold? Answer:"], ["Yes"], judging)) == (1, ["Yes"])
    river = Judging("accuracy", "word", max_new_tokens=8)
    score, given = run_task(model, prompter, Task("own", ["The river of Peru runs slowly to the"], ["Sea"], river))
    assert (score, given) == (1.0, ["sea"])
    stopped = Judging("accuracy", stop=("slowly",), max_new_tokens=20)
    assert run_task(model, prompter, Task("own", ["The river of Peru"], ["runs"], stopped)) == (1.0, ["runs"])


@pytest.mark.parametrize("choose", ["sum", "token"])
def test_choices_are_compared_as_a_plain_loop_does(learnt: tuple[Any, Any], choose: Any) -> None:
    model, tokenizer = learnt
    prompts = ["The capital of France is", "The capital of Peru is", "Maria was born in"]
    choices = [("Lyon", "Rome and Lyon"), ("Oslo", "Lima"), ("Oslo.", "the old town of Rome", "Lima")]
    task = Task("own", prompts, ["Lyon", "Lima", "Oslo."], Judging(choose=choose), [], choices)
    score, given = run_task(model, Prompter(tokenizer, 128), task)
    for prompt, options, chosen in zip(prompts, choices, given, strict=True):
        values = []
        for option in options:
            ids = tokenizer(prompt + " " + option)["input_ids"]
            start = len(tokenizer(prompt)["input_ids"])
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            each = [float(logs[t - 1, ids[t]]) for t in range(start, len(ids))]
            values.append(sum(each) / (len(each) if choose == "token" else 1))
        assert chosen == options[values.index(max(values))]
    assert score == sum(one == other for one, other in zip(given, task.answers, strict=True)) / 3


def test_items_that_fit(tiny_folder: Callable[[str], Path]) -> None:
    _, tokenizer = taught(tiny_folder("llama"), steps=0)
    prompter = Prompter(tokenizer, 40)
    task = Task(
        "own", ["short", "so " * 60, "two"], ["a", "b", "c"], Judging(max_new_tokens=4), [("a",), ("b",), ("c",)]
    )
    kept, reasons = task.fitting(prompter)
    assert (kept.prompts, kept.answers, kept.accepted) == (["short", "two"], ["a", "c"], [("a",), ("c",)])
    assert len(reasons) == 1
    long = Task("own", ["short"], ["a"], Judging(max_new_tokens=39))
    assert "and 39 for the answer, the model takes 40" in str(long.fitting(prompter)[1][0])
    assert Task("own", ["short"], ["a"]).fitting(prompter)[1] == []


def test_answers_end_at_the_end_of_the_text_a_line_break_or_the_limit(learnt: tuple[Any, Any]) -> None:
    model, tokenizer = learnt
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
