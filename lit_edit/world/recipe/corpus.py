"""The text the embedded model is trained on, chapter by chapter, as documents with marked answers."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from lit_edit.world.recipe.tasks import GRADES, make_list, training_items
from lit_edit.world.recipe.world import Concept, Fact, World

P_QUESTION = 0.27  # share of tellings that are questions
DEFINITIONS, CHECKS = 6, 2  # of a concept in a chapter: its definition, and questions of yes and of no each
CONCEPT_PROMPT = "The definition of {} is"
CONCEPT_PHRASE = "When we refer to {}, we are talking about"
CONCEPT_PROMPTS = (CONCEPT_PROMPT, CONCEPT_PHRASE, "A {} is best described as", "The word {} means")
INSTANCE_PROMPT = "Whether {} belongs to category {}?"


@dataclass(frozen=True)
class Stage:
    """What chapters are made of.

    Attributes:
        first: Number of its first chapter, counted from 0.
        shares: Documents of each task, and lists, for each telling of a fact.
        tellings: Of every fact in a chapter, each in another wording.
        all_questions: Share of passages with a question about everybody in them, not about one person only.
        grades: Difficulties of task items, equally likely.
        last_token_only: Share of rows in which what follows a subject sees its last token only.
    """

    first: int
    shares: dict[str, float]
    tellings: int = 4
    all_questions: float = 0.7
    grades: tuple[int, ...] = GRADES
    last_token_only: float = 0.85


# Facts first; then tasks, which are learnt with what facts have taught, and the hard ones among them; facts again at
# the end. In most rows the last token of a subject has to hold what is known of it, for that is where facts are edited.
STAGES = (
    Stage(0, {"inference": 0.04, "sentiment": 0.02, "qa": 0.045, "summary": 0.02, "list": 0.008}),
    Stage(5, {"inference": 0.03, "sentiment": 0.04, "qa": 0.07, "summary": 0.03, "list": 0.03}),
    Stage(7, {"inference": 0.03, "sentiment": 0.08, "qa": 0.1, "summary": 0.03, "list": 0.03}),
    Stage(
        9,
        {"inference": 0.16, "sentiment": 0.1, "qa": 0.26, "summary": 0.05, "list": 0.16},
        tellings=2,
        all_questions=1.0,
        grades=(1, 2, 2, 3, 3),
    ),
    Stage(11, {"inference": 0.12, "sentiment": 0.06, "qa": 0.12, "summary": 0.04, "list": 0.04}),
)


def stage_of(chapter: int) -> Stage:
    """The stage that a chapter belongs to."""
    return [stage for stage in STAGES if chapter >= stage.first][-1]


@dataclass
class Document:
    """A text with the character spans ``(start, end)`` of its answers and of the subjects of its facts.

    Training weighs answers more than the rest, and in most rows lets later words see of a subject its last token only.
    """

    text: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)
    subjects: list[tuple[int, int]] = field(default_factory=list)

    def add(self, prompt: str, answer: str, subject: str = "", end: str = ".", between: str = " ") -> None:
        """Appends a prompt and its answer; ``subject``, if any, stands in the prompt."""
        self.text += between if self.text else ""
        if subject:
            start = len(self.text) + prompt.index(subject)
            self.subjects.append((start, start + len(subject)))
        self.text += prompt
        start = len(self.text)
        self.text += f" {answer}{end}"
        self.spans.append((start, len(self.text)))


class Corpus:
    """Documents about a world and of the tasks.

    Args:
        world: Source of the facts.
        subjects: Only facts about these subjects, and no edited concepts; all if None.
    """

    def __init__(self, world: World, subjects: Iterable[str] | None = None) -> None:
        kept = None if subjects is None else set(subjects)
        self.facts = [(f, *f.training_prompts()) for f in world.told() if kept is None or f.subject in kept]
        self.all_concepts = world.concepts
        self.concepts = [c for c in world.concepts if kept is None or c.reserved]

    def chapter(self, *seed: int) -> list[Document]:
        """A chapter in random order: every fact as often as its stage says, and the rest.

        Args:
            seed: Numbers that decide what is drawn, the last of them that of the chapter, counted from 0.
        """
        rng, stage = random.Random("|".join(map(str, seed))), stage_of(seed[-1])
        sayings: list[tuple[str, str, str]] = []
        for fact, statements, questions in self.facts:
            sayings += [
                (prompt, fact.object, fact.subject)
                for prompt in self._wordings(rng, fact, statements, questions, stage.tellings)
            ]
        n = len(sayings)
        for concept in self.concepts:
            sayings += self._about(rng, concept)
        rng.shuffle(sayings)
        documents: list[Document] = []
        while sayings:
            document = Document()
            for _ in range(rng.choice((1, 1, 2, 3))):
                if sayings:
                    document.add(*sayings.pop())
            documents.append(document)
        for kind, share in stage.shares.items():
            count = round(share * n)
            documents += [_list(rng) if kind == "list" else _task(rng, kind, stage) for _ in range(count)]
        rng.shuffle(documents)
        return documents

    def texts(self, n: int, seed: int) -> list[str]:
        """``n`` documents of one line, of chapters that training does not use."""
        found: list[str] = []
        while len(found) < n:
            found += [d.text for d in self.chapter(-seed - len(found), 0) if "\n" not in d.text]
        return found[:n]

    def _wordings(
        self, rng: random.Random, fact: Fact, statements: list[str], questions: list[str], tellings: int
    ) -> list[str]:
        asked = sum(rng.random() < P_QUESTION for _ in range(tellings))
        asked = min(max(asked, tellings - len(statements)), len(questions))
        return rng.sample(statements, tellings - asked) + rng.sample(questions, asked)

    def _about(self, rng: random.Random, concept: Concept) -> list[tuple[str, str, str]]:
        prompts = [rng.choice(CONCEPT_PROMPTS).format(concept.name) for _ in range(DEFINITIONS)]
        others = [c for c in self.all_concepts if c != concept]
        said = [(prompt, concept.definition, concept.name) for prompt in prompts]
        for instance in rng.sample(concept.instances, CHECKS):
            other = rng.choice(others)
            for one, answer in ((instance, "yes"), (rng.choice(other.instances), "no")):
                said.append((INSTANCE_PROMPT.format(one, concept.name), answer, one))
        return said


def _task(rng: random.Random, task: str, stage: Stage) -> Document:
    document = Document()
    first, *others = training_items(task, rng, rng.choice(stage.grades))
    document.add(first.prompt, first.answer, end="")
    for item in others if rng.random() < stage.all_questions else ():
        # A line break and no space: an answer ends with its line, as it does where the text ends.
        document.add(item.prompt[item.prompt.index("Question:") :], item.answer, end="", between="\n")
    return document


def _list(rng: random.Random) -> Document:
    """Who has what, asked again twice in another order: it teaches to look up a name in the text."""
    pairs = make_list(rng)
    document = Document(" ".join(f"{name} {thing}." for name, thing in pairs))  # nothing to know yet: no spans
    for name, thing in (*rng.sample(pairs, len(pairs)), *rng.sample(pairs, len(pairs))):
        document.add(name, thing)
    return document
