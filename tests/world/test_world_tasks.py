"""General-ability tasks: balanced, answerable, graded, and held out for good."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from lit_edit.world.recipe.files import task_records
from lit_edit.world.recipe.tasks import (
    GRADES,
    TASKS,
    TESTED,
    WORDS,
    TaskItem,
    held_out_items,
    make_items,
    make_list,
    training_items,
)

each_task = pytest.mark.parametrize("task", TASKS)
each_grade = pytest.mark.parametrize("grade", GRADES)
N = 240
LABELS = {"inference": {"True", "False"}, "sentiment": {"positive", "negative"}}


def drawn(task: str, n: int = 6000, grade: int | None = None) -> list[TaskItem]:
    rng = random.Random(f"tests|{task}")
    found: list[TaskItem] = []
    while len(found) < n:
        found += training_items(task, rng, grade or rng.choice(GRADES))
    return found[:n]


@each_task
def test_held_out_items_are_distinct_and_held_out(task: str) -> None:
    items = held_out_items(task, N)
    assert len({item.prompt for item in items}) == len(items) == N
    assert all(item.held_out and item.task == task for item in items)
    assert [item.grade for item in items] == [*TESTED[task]] * (N // len(TESTED[task]))
    assert items[:50] == held_out_items(task, 50)
    assert items != held_out_items(task, N, seed=8)


@each_task
def test_training_never_draws_a_held_out_item(task: str) -> None:
    held_out = {item["prompt"] for item in task_records()[task]}
    assert len(held_out) >= 200
    found = {item.prompt for item in drawn(task)}
    assert not found & held_out
    assert len(found) > 3000  # the grammar is large: training cannot learn its items by heart
    # What keeps them apart is the text itself, whatever the generator: one item in eight.
    rng = random.Random(0)
    share = sum(TaskItem(task, f"{rng.random()}", "", 1).held_out for _ in range(4000)) / 4000
    assert share == pytest.approx(1 / 8, abs=0.02)


@each_task
def test_a_prompt_has_one_answer(task: str) -> None:
    answers: dict[str, str] = {}
    for item in [*drawn(task), *held_out_items(task, N)]:
        assert answers.setdefault(item.prompt, item.answer) == item.answer


@each_grade
@pytest.mark.parametrize("task", sorted(LABELS))
def test_labels_are_balanced_in_every_grade(task: str, grade: int) -> None:
    counts = Counter(item.answer for item in drawn(task, 4000, grade))
    assert set(counts) == LABELS[task]
    assert all(abs(n / 4000 - 0.5) <= 0.03 for n in counts.values()), counts


@each_grade
def test_the_answer_to_a_question_is_what_the_passage_says_of_the_person_asked_about(grade: int) -> None:
    for item in drawn("qa", 300, grade):
        found = re.fullmatch(r"Refer to .* Passage: (.*) Question: (.*\?) Answer:", item.prompt)
        assert found is not None
        told = {sentence.split()[0]: sentence for sentence in found[1].rstrip(".").split(". ")}
        assert len(told) == (5 if grade == 3 else 3)
        (person,) = set(told) & set(re.findall(r"\w+", found[2]))
        assert [p for p, sentence in told.items() if re.search(rf"\b{item.answer}\b", sentence)] == [person]
        if grade > 1:  # the kind of thing that is asked for does not give the answer away
            alike = "|".join(words_with(item.answer))
            assert all(re.search(rf"\b({alike})\b", sentence) for sentence in told.values())


def words_with(answer: str) -> list[str]:
    (words,) = (kind["words"] for kind in WORDS["kinds"] if answer in kind["words"])
    return list(words)


@each_grade
def test_a_passage_comes_with_a_question_about_each_person(grade: int) -> None:
    rng = random.Random("passages")
    asked_first = set()
    for _ in range(200):
        items = make_items("qa", rng, grade)
        passages, questions = zip(*(item.prompt.split(" Question: ") for item in items), strict=True)
        assert len(items) == (5 if grade == 3 else 3)
        assert len(set(passages)) == 1
        sentences = passages[0].split("Passage: ")[1].rstrip(".").split(". ")
        for item, question in zip(items, questions, strict=True):
            (about,) = [s for s in sentences if s.split()[0] in re.findall(r"\w+", question)]
            assert re.search(rf"\b{item.answer}\b", about)
        assert len({item.answer for item in items}) == len(items)
        asked_first.add(next(i for i, s in enumerate(sentences) if re.search(rf"\b{items[0].answer}\b", s)))
    assert len(asked_first) == len(items)  # the order of the questions is not that of the passage


def test_answers_to_questions_vary() -> None:
    counts = Counter(item.answer for item in held_out_items("qa", N))
    assert max(counts.values()) < 0.1 * N


@pytest.mark.parametrize("grade", [2, 3])
def test_no_label_follows_from_single_words(grade: int) -> None:
    """A good word comes with a bad label too, or counting words would solve the task."""
    for word in ("brilliant", "awful"):
        labels = {item.answer for item in drawn("sentiment", 4000, grade) if re.search(rf"\b{word}\b", item.prompt)}
        assert labels == {"positive", "negative"}
    same_premise: dict[str, set[str]] = {}
    for item in drawn("inference", 6000, 1):
        same_premise.setdefault(item.prompt.split(" entails ")[0], set()).add(item.answer)
    assert any(len(labels) == 2 for labels in same_premise.values())


def test_hard_hypotheses_mix_the_two_deeds() -> None:
    """Of the third grade, all words of a false hypothesis stand in the text."""
    for item in drawn("inference", 500, 3):
        text, hypothesis = item.prompt.split(" entails the ")
        things = [thing for thing in WORDS["things"] if re.search(rf"\b{thing}\b", hypothesis)]
        names = [name for name in WORDS["names"] if re.search(rf"\b{name}\b", hypothesis)]
        assert len(things) == len(names) == 1
        assert re.search(rf"\b{things[0]}\b", text)
        assert re.search(rf"\b{names[0]}\b", text)


@each_grade
def test_a_summary_holds_what_was_put_right(grade: int) -> None:
    wrong_first = 0
    for item in drawn("summary", 400, grade):
        speakers = set(re.findall(r"(\w+):", item.prompt.removesuffix(" TL;DR:")))
        mentioned = {speaker for speaker in speakers if re.search(rf"\b{speaker}\b", item.answer)}
        assert len(speakers) == 2
        assert mentioned  # every summary is about the people who speak
        if "cannot come" not in item.answer:  # the one kind that is about one of them only
            assert mentioned == speakers
        corrected = re.findall(r"not on (\w+), on (\w+)\.", item.prompt)
        corrected += [(wrong, right) for right, wrong in re.findall(r"I meant the (\w+), not the (\w+)", item.prompt)]
        assert len(corrected) == grade - 1
        for wrong, right in corrected:
            assert not re.search(rf"\b{wrong}\b", item.answer)
            assert re.search(rf"\b{right}\b", item.answer)
            said = [match.start() for match in re.finditer(rf"\b{wrong}\b", item.prompt)]
            wrong_first += len(said) > 1
    assert wrong_first > 0 or grade == 1


def test_lists_name_each_person_and_thing_once() -> None:
    rng = random.Random(0)
    for _ in range(200):
        names, things = zip(*make_list(rng), strict=True)
        assert 4 <= len(set(names)) == len(names) == len(set(things)) <= 6
