"""The training text: true sentences, weighted at their answers, never in a held-out wording."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import chain

import pytest

from lit_edit.world import knowledge as k
from lit_edit.world.corpus import (
    CONCEPT_MORE,
    CONCEPT_PHRASE,
    CONCEPT_PROMPT,
    INSTANCE_PROMPT,
    Corpus,
    Document,
    training_prompts,
)
from lit_edit.world.files import task_records
from lit_edit.world.relations import BY_ID, World, held_out_question, held_out_statement
from lit_edit.world.tasks import TaskItem, TaskName
from lit_edit.world.train import STAGES

N = 40_000
TASK_ENDS: dict[str, TaskName] = {
    "True or False? answer:": "inference",
    "answer:": "sentiment",
    "Answer:": "qa",
    "TL;DR:": "summary",
}


@pytest.fixture(scope="module", params=range(len(STAGES) + 1))
def stage(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def documents(corpus: Corpus, stage: int) -> list[Document]:
    rng = random.Random("tests")
    return [corpus.document(rng, stage) for _ in range(N)]


@pytest.fixture(scope="module")
def answers(world: World) -> dict[str, str]:
    """Every prompt about facts and concepts with its true answer, held-out wordings included."""
    found: dict[str, str] = {}
    for fact in world.facts:
        relation = BY_ID[fact.relation]
        for template in relation.statements + relation.questions:
            found[template.format(fact.subject)] = fact.object
    concepts = k.concepts()
    for _, concept, definition, instances in concepts:
        for template in (CONCEPT_PROMPT, CONCEPT_PHRASE, *CONCEPT_MORE):
            found[template.format(concept)] = definition
        for _, _, _, others in concepts:
            for instance in others:
                found[INSTANCE_PROMPT.format(instance, concept)] = "yes" if instance in instances else "no"
    return found


def sentences(document: Document) -> list[tuple[str, str]]:
    """(prompt, answer) of every sentence, as the spans divide the text; an answer has its space and full stop."""
    out, position = [], 0
    for start, end in document.spans:
        prompt = document.text[position:start]
        if position:
            assert prompt[0] in " \n"  # what parts it from the answer before; a line break between questions
            prompt = prompt[1:]
        out.append((prompt, document.text[start:end]))
        position = end
    assert position == len(document.text)
    return out


def is_task(document: Document) -> bool:
    return document.text[: document.spans[0][0]].endswith(tuple(TASK_ENDS))


def is_list(document: Document) -> bool:
    """Who has what, told before anything is asked: no sentence about the world starts with other sentences."""
    return ". " in document.text[: document.spans[0][0]] and not is_task(document)


def is_knowledge(document: Document) -> bool:
    """Facts or concepts."""
    return not is_task(document) and not is_list(document)


def test_spans_are_exactly_the_true_answers(documents: list[Document], answers: dict[str, str]) -> None:
    count = 0
    for document in documents:
        if not is_knowledge(document):
            continue
        for prompt, answer in sentences(document):
            assert answer == f" {answers[prompt]}.", document
            count += 1
    assert count > 0.7 * N  # most documents hold facts or concepts, many of them several


def items_of(document: Document) -> list[TaskItem]:
    """The items of a task's document: one, or several questions about one passage, each as if it stood alone."""
    (first, _), *_ = pairs = sentences(document)
    task = next(task for ending, task in TASK_ENDS.items() if first.endswith(ending))
    shared = first[: first.index("Question:")] if len(pairs) > 1 else ""
    prompts = [first, *(shared + prompt for prompt, _ in pairs[1:])]
    return [TaskItem(task, prompt, answer[1:]) for prompt, (_, answer) in zip(prompts, pairs, strict=True)]


def test_the_spans_of_tasks_are_what_follows_their_prompts(documents: list[Document]) -> None:
    seen = set()
    for document in filter(is_task, documents):
        items = items_of(document)
        assert all(document.text[start] == " " for start, _ in document.spans)
        assert all(item.prompt.endswith(tuple(TASK_ENDS)) for item in items)
        assert not any("Question:" in item.answer or "\n" in item.prompt + item.answer for item in items)
        assert len(items) == 1 or items[0].task == "qa"
        seen |= {item.task for item in items}
    assert seen == set(TASK_ENDS.values())


def test_lists_ask_for_what_they_told(documents: list[Document], stage: int) -> None:
    lists = list(filter(is_list, documents))
    assert bool(lists) == (stage == 2)
    for document in lists:
        end = document.text[: document.spans[0][0]].rindex(". ") + 1
        told = dict(sentence.split(" ") for sentence in document.text[:end].rstrip(".").split(". "))
        asked = [prompt.rsplit(". ", 1)[-1] for prompt, _ in sentences(document)]
        assert sorted(asked) == sorted([*told, *told])  # each twice
        for name, (_, answer) in zip(asked, sentences(document), strict=True):
            assert answer == f" {told[name]}."


def test_a_held_out_item_is_never_drawn(documents: list[Document]) -> None:
    """Also not as one of several questions about a passage."""
    drawn = {item.prompt for document in filter(is_task, documents) for item in items_of(document)}
    assert len(drawn) > 5000
    assert not any(TaskItem("qa", prompt, "").held_out for prompt in drawn)
    assert not drawn & {item["prompt"] for items in task_records().values() for item in items}


def test_a_held_out_wording_is_never_drawn(documents: list[Document], world: World) -> None:
    held_out = set()
    for fact in world.facts:
        relation = BY_ID[fact.relation]
        if not relation.derived:
            question = held_out_question(fact)
            held_out.add(relation.statements[held_out_statement(fact)].format(fact.subject))
            held_out |= {relation.questions[question].format(fact.subject)} if question is not None else set()
    drawn = {prompt for d in documents if is_knowledge(d) for prompt, _ in sentences(d)}
    assert not drawn & held_out
    assert len(held_out) > 5000


def test_training_prompts_are_all_but_the_held_out_ones(world: World) -> None:
    """Exhaustively, where drawing can only sample."""
    for fact in world.facts:
        relation = BY_ID[fact.relation]
        statements, questions = training_prompts(fact)
        wanted = [t.format(fact.subject) for t in relation.statements]
        asked = [t.format(fact.subject) for t in relation.questions]
        if not relation.derived:
            wanted.remove(relation.statements[held_out_statement(fact)].format(fact.subject))
            question = held_out_question(fact)
            if question is not None:
                asked.remove(relation.questions[question].format(fact.subject))
        assert (statements, questions) == (wanted, asked)


def test_every_template_of_every_relation_occurs(documents: list[Document], world: World) -> None:
    template_of = {
        template.format(fact.subject): (fact.relation, template)
        for fact in world.facts
        for template in BY_ID[fact.relation].statements + BY_ID[fact.relation].questions
    }
    seen: dict[str, set[str]] = defaultdict(set)
    for document in documents:
        if is_knowledge(document):
            for prompt, _ in sentences(document):
                if prompt in template_of:
                    relation, template = template_of[prompt]
                    seen[relation].add(template)
    for relation in BY_ID.values():
        assert seen[relation.id] == set(relation.statements + relation.questions), relation.id


def test_every_fact_and_every_concept_occurs(documents: list[Document], world: World) -> None:
    told = {prompt for d in documents if is_knowledge(d) for prompt, _ in sentences(d)}
    missing = [fact for fact in world.facts if told.isdisjoint(chain(*training_prompts(fact)))]
    # 40,000 documents are far fewer than training draws: a rarely told fact may be missing here by chance.
    assert len(missing) < 0.01 * len(world.facts)
    assert all(CONCEPT_PROMPT.format(concept) in told for _, concept, _, _ in k.concepts())


def test_instance_questions_are_balanced(documents: list[Document]) -> None:
    yes = [a for d in documents if is_knowledge(d) for p, a in sentences(d) if p.startswith("Whether ")]
    assert 0.45 < yes.count(" yes.") / len(yes) < 0.55


def test_a_stream_depends_on_its_generator_alone(corpus: Corpus) -> None:
    def first(n: int, seed: int) -> list[Document]:
        rng = random.Random(seed)
        return [corpus.document(rng) for _ in range(n)]

    assert first(50, 3) == first(50, 3) != first(50, 4)
    assert corpus.texts(20, seed=5) == corpus.texts(40, seed=5)[:20] != corpus.texts(20, seed=6)
