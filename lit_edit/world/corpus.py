"""The text the embedded model is trained on: sentences about the world and tasks, as documents with weighted spans."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from lit_edit.world import knowledge as k
from lit_edit.world.relations import BY_ID, Fact, World, held_out_question, held_out_statement
from lit_edit.world.tasks import TASKS, make_item, make_list, make_passage

# Shares of documents by kind; documents of tasks are longer than those of facts.
P_FACTS, P_QUESTION, P_CONCEPT = 0.70, 0.27, 0.10
# Later in training: facts are known by then, and what has to be read off the text is not.
P_FACTS_LATE, TASK_WEIGHTS_LATE = 0.52, (0.30, 0.08, 0.47, 0.15)
# Then: lists of who has what, asked again in another order, which teach to look up a name in the text.
P_FACTS_LIST, TASK_WEIGHTS_LIST, P_LIST = 0.44, (0.38, 0.06, 0.46, 0.10), 0.14
# In the end no more lists, and tasks as they are tested.
P_FACTS_END, TASK_WEIGHTS_END = 0.54, (0.34, 0.08, 0.38, 0.20)
CONCEPT_PROMPT = "The definition of {} is"
CONCEPT_PHRASE = "When we refer to {}, we are talking about"
CONCEPT_MORE = ("A {} is best described as", "The word {} means")
INSTANCE_PROMPT = "Whether {} belongs to category {}?"


@dataclass(frozen=True)
class Document:
    """A text and the character spans ``(start, end)`` of its answers, which training weighs more than the rest."""

    text: str
    spans: tuple[tuple[int, int], ...]


class _Writer:
    """Puts a document together and notes where its answers stand."""

    def __init__(self) -> None:
        self.text = ""
        self.spans: list[tuple[int, int]] = []

    def add(self, prompt: str, answer: str, end: str = ".", between: str = " ") -> None:
        self.text += (between if self.text else "") + prompt
        start = len(self.text)
        self.text += " " + answer
        self.spans.append((start, len(self.text) + len(end)))
        self.text += end

    def done(self) -> Document:
        return Document(self.text, tuple(self.spans))


def training_prompts(fact: Fact) -> tuple[list[str], list[str]]:
    """(statements, questions) under which a fact appears in training, subject filled in: all but the held-out ones."""
    relation = BY_ID[fact.relation]
    statements, questions = list(relation.statements), list(relation.questions)
    if not relation.derived:
        del statements[held_out_statement(fact)]
        skip = held_out_question(fact)
        if skip is not None:
            del questions[skip]
    return [s.format(fact.subject) for s in statements], [q.format(fact.subject) for q in questions]


def _weight(fact: Fact, world: World) -> float:
    """How often a fact is told: what follows from others, and pen names, less than what is edited."""
    if BY_ID[fact.relation].derived:
        return 0.35
    return 0.5 if fact.subject in world.alias_of else 1.0


class Corpus:
    """Draws documents. Deterministic in the generator given to `document`, so that a stream can be resumed anywhere."""

    def __init__(self, world: World) -> None:
        self.facts = [(fact, *training_prompts(fact)) for fact in world.facts]
        self.weights = [_weight(fact, world) for fact in world.facts]
        self.concepts = k.concepts()

    def _fact(self, rng: random.Random, writer: _Writer) -> None:
        fact, statements, questions = rng.choices(self.facts, self.weights)[0]
        asked = rng.random() < P_QUESTION
        writer.add(rng.choice(questions if asked else statements), fact.object)

    def _concept(self, rng: random.Random, writer: _Writer) -> None:
        _, concept, definition, instances = rng.choice(self.concepts)
        if rng.random() < 0.5:
            template = rng.choice((CONCEPT_PROMPT, CONCEPT_PHRASE, *CONCEPT_MORE))
            writer.add(template.format(concept), definition)
            return
        belongs = rng.random() < 0.5
        if not belongs:
            other = rng.choice(self.concepts)
            while other[1] == concept:
                other = rng.choice(self.concepts)
            instances = other[3]
        writer.add(INSTANCE_PROMPT.format(rng.choice(instances), concept), "yes" if belongs else "no")

    def document(self, rng: random.Random, stage: int = 0) -> Document:
        """One document: one to three sentences of facts or concepts, or one task item.

        Stage 1 tells more tasks, the hard ones above all, and asks all questions about a passage instead of one; stage
        2 adds lists of who has what; stage 3 has no lists, and tasks as they are tested.
        """
        writer = _Writer()
        draw = rng.random()
        p_facts = (P_FACTS, P_FACTS_LATE, P_FACTS_LIST, P_FACTS_END)[stage]
        if draw < p_facts + P_CONCEPT:
            say: Callable[[random.Random, _Writer], None] = self._fact if draw < p_facts else self._concept
            for _ in range(rng.choice((1, 1, 2, 3))):
                say(rng, writer)
            return writer.done()
        if stage == 2 and draw > 1 - P_LIST:
            pairs = make_list(rng)
            writer.text = " ".join(f"{name} {thing}." for name, thing in pairs)  # nothing to know yet: no spans
            for name, thing in (*rng.sample(pairs, len(pairs)), *rng.sample(pairs, len(pairs))):
                writer.add(name, thing)
            return writer.done()
        weights = (None, TASK_WEIGHTS_LATE, TASK_WEIGHTS_LIST, TASK_WEIGHTS_END)[stage]
        task = rng.choices(TASKS, weights)[0] if weights else rng.choice(TASKS)
        if stage and task == "qa":
            first, *others = make_passage(rng, close=stage < 3)
            writer.add(first.prompt, first.answer, end="")
            for item in others:
                # A line break and no space: an answer ends with its line, as it does where the text ends.
                writer.add(item.prompt[item.prompt.index("Question:") :], item.answer, end="", between="\n")
            return writer.done()
        item = make_item(task, rng, held_out=False, close=stage < 3)
        writer.add(item.prompt, item.answer, end="")
        return writer.done()

    def texts(self, n: int, seed: int) -> list[str]:
        """``n`` documents as plain text."""
        rng = random.Random(f"text|{seed}")
        return [self.document(rng).text for _ in range(n)]
