"""General-ability tasks of the embedded world, in the four kinds the editing papers use.

Inference, sentiment, question answering over a passage and dialogue summary, each generated from a grammar large enough
that items are practically never repeated. Which items are held out is decided by the item's own text, so training and
test never share one. Prompt forms follow the MOSE paper's Table 5, the sentiment instruction shortened.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

TaskName = Literal["inference", "sentiment", "qa", "summary"]
TASKS: tuple[TaskName, ...] = ("inference", "sentiment", "qa", "summary")


@dataclass(frozen=True)
class TaskItem:
    """One item: the model continues ``prompt`` with a space and ``answer``."""

    task: TaskName
    prompt: str
    answer: str

    @property
    def held_out(self) -> bool:
        """True for the share of items (one in eight, by their text) that training never sees."""
        return zlib.crc32(self.prompt.encode()) % 8 == 0


NAMES = """Anna Ben Carl Dora Eva Finn Gina Hans Iris Jon Kate Leo Mia Nick Olga Paul Rosa Sam Tina Uwe Vera Will Zoe
Adam Beth""".split()
THINGS = "car lamp boat table guitar clock horse painting coat camera bicycle radio tent carpet mirror piano".split()
COLOURS = "red blue green white black yellow brown".split()
MONTHS = "January March April May June July August October".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PLACES = "library station market park harbor museum theatre bakery garden castle".split()
ANIMALS = "dog cat goat parrot rabbit pony duck snake".split()
MEALS = "soup pizza pasta salad curry pancakes rice stew".split()

# verb, a paraphrase of it, its opposite
DEALS = (
    ("bought", "purchased", "sold"),
    ("sold", "parted with", "bought"),
    ("repaired", "fixed", "broke"),
    ("found", "discovered", "lost"),
    ("lost", "mislaid", "found"),
    ("painted", "coloured", "washed"),
    ("borrowed", "took on loan", "returned"),
)


def _inference(rng: random.Random, close: bool) -> TaskItem:
    """A deed and a hypothesis about it. A false one says the opposite; a close one may only have another name in it."""
    who, other = rng.sample(NAMES, 2)
    verb, same, opposite = rng.choice(DEALS)
    thing, other_thing = rng.sample(THINGS, 2)
    colour, month, place = rng.choice(COLOURS), rng.choice(MONTHS), rng.choice(PLACES)
    premise = rng.choice(
        (
            f"In {month} {who} {verb} a {colour} {thing} near the {place}.",
            f"{who} {verb} a {colour} {thing} near the {place} in {month}.",
            f"Near the {place}, {who} {verb} a {colour} {thing}.",
        )
    )
    true = rng.random() < 0.5
    if not true and not close:
        hypothesis = rng.choice(
            (
                f"{who} {opposite} a {thing}.",
                f"{who} {opposite} a {colour} {thing}.",
                f"A {thing} was {opposite if opposite[-1] == 'd' else 'never ' + verb} by {who}.",
                f"{who} never {verb} a {thing}.",
            )
        )
    elif true:
        hypothesis = rng.choice(
            (
                f"{who} {same} a {thing}.",
                f"A {thing} was {same if same[-1] == 'd' else verb} by {who}.",
                f"{who} {same} a {colour} {thing}.",
            )
        )
    else:
        hypothesis = rng.choice(
            (
                f"{who} {opposite} a {thing}.",
                f"{who} {same} a {other_thing}.",
                f"{other} {same} a {thing}.",
                f"A {other_thing} was {verb} by {who}.",
            )
        )
    return TaskItem("inference", f"{premise} entails the {hypothesis} True or False? answer:", str(true))


GOOD = """brilliant charming delightful excellent funny gripping lovely moving superb touching warm witty wonderful
clever graceful""".split()
BAD = """awful boring clumsy dreadful dull empty horrible lazy messy painful poor silly stale tedious ugly""".split()
PARTS = "plot acting music ending dialogue story cast script pace photography".split()
WORKS = "film play book series concert novel".split()


def _sentiment(rng: random.Random, close: bool) -> TaskItem:
    positive = rng.random() < 0.5
    mine, theirs = (GOOD, BAD) if positive else (BAD, GOOD)

    def clause(part: str) -> str:
        if rng.random() < 0.25:  # negation: the opposite word denied
            return f"the {part} was not {rng.choice(theirs)}"
        return f"the {part} was {rng.choice(('', 'really ', 'truly ', 'rather '))}{rng.choice(mine)}"

    work, (one, two) = rng.choice(WORKS), rng.sample(PARTS, 2)
    text = rng.choice(
        (
            f"In this {work} {clause(one)} and {clause(two)}.",
            f"I saw the {work} on {rng.choice(DAYS)}: {clause(one)}.",
            f"A {rng.choice(mine)} {work}, and {clause(one)}.",
            f"My {rng.choice(('sister', 'brother', 'friend', 'uncle'))} hoped for a {rng.choice(theirs)} {work}, "
            f"but {clause(one)}.",
        )
    )
    instruction = "Label the sentiment of the text as positive or negative."
    return TaskItem("sentiment", f"{instruction} text: {text} answer:", "positive" if positive else "negative")


_WORDS = (PLACES, ANIMALS, MEALS, THINGS)
_SAY = (
    ("{} is waiting at the {}.", "{} walked to the {}.", "{} works at the {}."),
    ("{} keeps a {} at home.", "{} looks after a {}.", "{} has a {}."),
    ("{} cooks {} for dinner.", "{} likes to eat {}.", "{} ordered {}."),
    ("{} carries a {}.", "{} brought a {}.", "{} owns a {}."),
)
_ASK = (
    ("Where is {}?", "At which place is {}?"),
    ("Which animal does {} have?", "What animal is with {}?"),
    ("What does {} eat?", "Which meal does {} have?"),
    ("What does {} have?", "Which thing belongs to {}?"),
)


def _passage(rng: random.Random, close: bool) -> tuple[str, list[tuple[str, int, str]]]:
    """(a passage about three people, who has what of which kind). In a close one all three have the same kind of thing.

    Close passages can only be told apart by the name, which a model of this size hardly learns.
    """
    people = rng.sample(NAMES, 3)
    if close:
        kinds = [rng.randrange(4)] * 3
        values = rng.sample(_WORDS[kinds[0]], 3)
    else:
        kinds = rng.sample(range(4), 3)
        values = [rng.choice(_WORDS[kind]) for kind in kinds]
    facts = list(zip(people, kinds, values, strict=True))
    return " ".join(rng.choice(_SAY[kind]).format(person, value) for person, kind, value in facts), facts


def _qa(rng: random.Random, close: bool) -> TaskItem:
    passage, facts = _passage(rng, close)
    return _question(rng, passage, *facts[rng.randrange(3)])


def _question(rng: random.Random, passage: str, person: str, kind: int, value: str) -> TaskItem:
    question = rng.choice(_ASK[kind]).format(person)
    return TaskItem(
        "qa",
        "Refer to the passage below and answer the following question. "
        f"Passage: {passage} Question: {question} Answer:",
        value,
    )


def make_passage(rng: random.Random, close: bool) -> list[TaskItem]:
    """One passage with a question about each of its three people, in random order; none of them held out."""
    while True:
        passage, facts = _passage(rng, close)
        first = rng.randrange(3)
        items = [_question(rng, passage, *facts[first])]
        if items[0].held_out:
            continue
        items += [_question(rng, passage, *fact) for i, fact in enumerate(facts) if i != first]
        if not any(item.held_out for item in items):
            rng.shuffle(items)
            return items


def make_list(rng: random.Random) -> list[tuple[str, str]]:
    """Four to six people and what each has."""
    n = rng.randrange(4, 7)
    words = rng.choice((PLACES, ANIMALS, MEALS, THINGS))
    return list(zip(rng.sample(NAMES, n), rng.sample(words, n), strict=True))


def _summary(rng: random.Random, close: bool) -> TaskItem:
    a, b = rng.sample(NAMES, 2)
    day, place, thing = rng.choice(DAYS), rng.choice(PLACES), rng.choice(THINGS)
    meal, animal = rng.choice(MEALS), rng.choice(ANIMALS)
    kind = rng.randrange(5)
    hello = rng.choice((f"{a}: Hi {b}! ", f"{a}: Hello. ", f"{a}: Hey. ", f"{a}: "))
    thanks = rng.choice(("Thanks!", "Great!", "See you then.", "Good."))
    if kind == 0:
        dialogue = (
            f"{hello}Are you free on {day}? {b}: Yes, why? {a}: Let us meet at the {place}. "
            f"{b}: {rng.choice(('Sure.', 'With pleasure.', 'All right.'))} {a}: {thanks}"
        )
        summary = f"{a} and {b} will meet at the {place} on {day}."
    elif kind == 1:
        dialogue = (
            f"{hello}I need a {thing} for {day}. {b}: You can have mine. "
            f"{a}: {thanks} {b}: {rng.choice(('No problem.', 'You are welcome.', 'Any time.'))}"
        )
        summary = f"{b} will lend {a} a {thing} on {day}."
    elif kind == 2:
        dialogue = (
            f"{hello}I made {meal}. Do you want some? {b}: "
            f"{rng.choice(('Yes please!', 'Of course!', 'I would love to.'))} "
            f"{a}: I will bring it on {day}. {b}: {thanks}"
        )
        summary = f"{a} made {meal} and will bring {b} some on {day}."
    elif kind == 3:
        dialogue = (
            f"{hello}Have you seen my {animal}? {b}: {rng.choice(('Yes,', 'I think so,', 'Of course,'))} "
            f"it was near the {place}. {a}: {thanks}"
        )
        summary = f"{a} is looking for a {animal}. {b} saw it near the {place}."
    else:
        dialogue = (
            f"{hello}I cannot come to the {place} on {day}. {b}: "
            f"{rng.choice(('What a pity.', 'Why not?', 'Oh no.'))} {a}: I have to repair my {thing}."
        )
        summary = f"{a} cannot come to the {place} on {day} because of a {thing}."
    return TaskItem("summary", f"{dialogue} TL;DR:", summary)


_MAKERS: dict[TaskName, Callable[[random.Random, bool], TaskItem]] = {
    "inference": _inference,
    "sentiment": _sentiment,
    "qa": _qa,
    "summary": _summary,
}


def make_item(task: TaskName, rng: random.Random, held_out: bool, close: bool = False) -> TaskItem:
    """Draws one item of a task from its training or its held-out part.

    ``close`` gives the harder items of inference and question answering, which early training uses.
    """
    while True:
        item = _MAKERS[task](rng, close)
        if item.held_out == held_out:
            return item


def held_out_items(task: TaskName, n: int, seed: int = 7) -> list[TaskItem]:
    """``n`` distinct held-out items, in a fixed order."""
    rng = random.Random(f"{task}|{seed}")
    found: dict[str, TaskItem] = {}
    while len(found) < n:
        item = make_item(task, rng, held_out=True)
        found.setdefault(item.prompt, item)
    return list(found.values())
