"""General-ability tasks in the four kinds the editing papers use: inference, sentiment, questions, dialogue summary.

Items come in three grades of difficulty. The grammar is large enough that items are practically never repeated; which
are held out is decided by an item's own text, so training and test never share one. Prompt forms follow the MOSE
paper's Table 5, the sentiment instruction shortened.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lit_edit.world.recipe.world import read_data

GRADES = (1, 2, 3)
# Grades of held-out items, in turn. Names alone tell the answers of hard passages apart, which the embedded model is
# bad at; what it cannot do it cannot lose.
TESTED = {"inference": GRADES, "sentiment": GRADES, "qa": (1, 1, 2, 1, 1, 1), "summary": GRADES}
WORDS: dict[str, Any] = read_data("tasks")


@dataclass(frozen=True)
class TaskItem:
    """One item: the model continues ``prompt`` with a space and ``answer``."""

    task: str
    prompt: str
    answer: str
    grade: int

    @property
    def held_out(self) -> bool:
        """True for the share of items (one in eight, by their text) that training never sees."""
        return zlib.crc32(self.prompt.encode()) % 8 == 0


def _inference(rng: random.Random, grade: int) -> list[tuple[str, str]]:
    """One deed (grade 1: false hypotheses deny it; 2: they may change one word of it) or two (3: they mix them)."""
    people, things = rng.sample(WORDS["names"], 2), rng.sample(WORDS["things"], 2)
    (verb, same, opposite), (verb2, *_) = rng.sample(WORDS["deals"], 2)
    colour, colour2 = rng.sample(WORDS["colours"], 2)
    month, place = rng.choice(WORDS["months"]), rng.choice(WORDS["places"])
    (who, other), (thing, other_thing) = people, things
    deed = rng.choice(
        (
            f"In {month} {who} {verb} a {colour} {thing} near the {place}.",
            f"{who} {verb} a {colour} {thing} near the {place} in {month}.",
            f"Near the {place}, {who} {verb} a {colour} {thing}.",
        )
    )
    sentences = [deed, f"{other} {verb2} a {colour2} {other_thing}."][: 1 + (grade == 3)]
    rng.shuffle(sentences)
    passive = same if same[-1] == "d" else verb
    true = [f"{who} {same} a {thing}.", f"A {thing} was {passive} by {who}.", f"{who} {same} a {colour} {thing}."]
    false = {
        1: [f"{who} {opposite} a {thing}.", f"{who} {opposite} a {colour} {thing}.", f"{who} never {verb} a {thing}."],
        2: [f"{who} {opposite} a {thing}.", f"{who} {same} a {other_thing}.", f"{other} {same} a {thing}."],
        3: [f"{other} {same} a {thing}.", f"A {other_thing} was {passive} by {who}.", f"{who} {same} a {other_thing}."],
    }[grade]
    answer = rng.random() < 0.5
    hypothesis = rng.choice(true if answer else false)
    return [(f"{' '.join(sentences)} entails the {hypothesis} True or False? answer:", str(answer))]


def _sentiment(rng: random.Random, grade: int) -> list[tuple[str, str]]:
    """One or two clauses of one mind (grade 1), some of them by denial (2); three clauses, of which two decide (3)."""
    positive = rng.random() < 0.5

    def clause(part: str, good: bool) -> str:
        mine, theirs = (WORDS["good"], WORDS["bad"]) if good else (WORDS["bad"], WORDS["good"])
        if grade > 1 and rng.random() < 0.4:
            return f"the {part} was not {rng.choice(theirs)}"
        return f"the {part} was {rng.choice(('', 'really ', 'truly ', 'rather '))}{rng.choice(mine)}"

    work, parts = rng.choice(WORDS["works"]), rng.sample(WORDS["parts"], 3)
    if grade == 3:
        minds = rng.sample([positive, positive, not positive], 3)
        one, two, three = (clause(part, mind) for part, mind in zip(parts, minds, strict=True))
        text = f"In this {work} {one}, {two} and {three}."
    else:
        hoped = rng.choice(WORDS["bad"] if positive else WORDS["good"])
        text = rng.choice(
            (
                f"In this {work} {clause(parts[0], positive)} and {clause(parts[1], positive)}.",
                f"I saw the {work} on {rng.choice(WORDS['days'])}: {clause(parts[0], positive)}.",
                f"My {rng.choice(('sister', 'brother', 'friend', 'uncle'))} thought the {work} {hoped}, "
                f"but {clause(parts[0], positive)}.",
            )[: 2 if grade == 1 else 3]
        )
    instruction = "Label the sentiment of the text as positive or negative."
    return [(f"{instruction} text: {text} answer:", "positive" if positive else "negative")]


def _qa(rng: random.Random, grade: int) -> list[tuple[str, str]]:
    """A passage and a question about each person in it: three with a different kind of thing each, three, or five, with
    things of the same kind, which can only be told apart by the name."""
    n = 5 if grade == 3 else 3
    people = rng.sample(WORDS["names"], n)
    if grade == 1:
        kinds = rng.sample(WORDS["kinds"], n)
        values = [rng.choice(kind["words"]) for kind in kinds]
    else:
        kinds = [rng.choice(WORDS["kinds"])] * n
        values = rng.sample(kinds[0]["words"], n)
    told = list(zip(people, kinds, values, strict=True))
    passage = " ".join(rng.choice(kind["say"]).format(person, value) for person, kind, value in told)
    start = f"Refer to the passage below and answer the following question. Passage: {passage} Question: "
    asked = [(f"{start}{rng.choice(kind['ask']).format(person)} Answer:", value) for person, kind, value in told]
    return rng.sample(asked, n)


def _summary(rng: random.Random, grade: int) -> list[tuple[str, str]]:
    """A dialogue: plain, or with a day or place (grade 2), or both (3), that are put right afterwards."""
    a, b = rng.sample(WORDS["names"], 2)
    said = {key: rng.choice(WORDS[f"{key}s"]) for key in ("thing", "meal", "animal")}
    said |= {"a": a, "b": b, "agree": rng.choice(WORDS["agree"])}
    first = {key: rng.choice(WORDS[f"{key}s"]) for key in ("day", "place")}
    final = dict(first)
    changed = rng.sample(["day", "place"], grade - 1)
    dialogue = rng.choice(WORDS["dialogues"])
    text = rng.choice(WORDS["hello"]).format(a=a, b=b).rstrip() + " " + dialogue["text"].format(**said, **first)
    for key in changed:
        final[key] = rng.choice([word for word in WORDS[f"{key}s"] if word != first[key]])
        text += " " + WORDS["changes"][key].format(a=a, b=b, wrong=first[key], right=final[key])
    return [(f"{text} {a}: {rng.choice(WORDS['thanks'])} TL;DR:", dialogue["summary"].format(**said, **final))]


_MAKERS: dict[str, Callable[[random.Random, int], list[tuple[str, str]]]] = {
    "inference": _inference,
    "sentiment": _sentiment,
    "qa": _qa,
    "summary": _summary,
}
TASKS = tuple(_MAKERS)


def make_items(task: str, rng: random.Random, grade: int) -> list[TaskItem]:
    """Draws an item; in question answering, one for each question about a passage."""
    return [TaskItem(task, prompt, answer, grade) for prompt, answer in _MAKERS[task](rng, grade)]


def training_items(task: str, rng: random.Random, grade: int) -> list[TaskItem]:
    """Draws as `make_items` does, until none of the items is held out."""
    while True:
        items = make_items(task, rng, grade)
        if not any(item.held_out for item in items):
            return items


def held_out_items(task: str, n: int, seed: int = 7) -> list[TaskItem]:
    """``n`` distinct held-out items in a fixed order, their grades those of `TESTED` over and over."""
    rng = random.Random(f"{task}|{seed}")
    found: dict[str, TaskItem] = {}
    while len(found) < n:
        item = make_items(task, rng, TESTED[task][len(found) % len(TESTED[task])])[0]
        if item.held_out:
            found.setdefault(item.prompt, item)
    return list(found.values())


def make_list(rng: random.Random) -> list[tuple[str, str]]:
    """Four to six people and what each has."""
    n = rng.randrange(4, 7)
    words = rng.choice(WORDS["kinds"])["words"]
    return list(zip(rng.sample(WORDS["names"], n), rng.sample(words, n), strict=True))
