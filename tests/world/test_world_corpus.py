"""The training text: every fact as often as the next, true, weighted at its answers, never in a held-out wording."""

from __future__ import annotations

from collections import Counter

import pytest

from lit_edit.world.recipe import corpus as recipe
from lit_edit.world.recipe.corpus import CONCEPT_PROMPTS, INSTANCE_PROMPT, Corpus, Document
from lit_edit.world.recipe.files import task_records
from lit_edit.world.recipe.tasks import TaskItem
from lit_edit.world.recipe.world import RELATIONS, World

TASK_ENDS = {
    "True or False? answer:": "inference",
    "answer:": "sentiment",
    "Answer:": "qa",
    "TL;DR:": "summary",
}


@pytest.fixture(scope="module")
def documents(corpus: Corpus) -> list[Document]:
    return corpus.chapter(1, 0)


@pytest.fixture(scope="module")
def answers(world: World) -> dict[str, str]:
    """Every prompt about facts and concepts with its true answer, held-out wordings included."""
    found: dict[str, str] = {}
    for fact in world.facts:
        relation = RELATIONS[fact.relation]
        for template in relation.statements + relation.questions:
            found[template.format(fact.subject)] = fact.object
    for concept in world.concepts:
        for template in CONCEPT_PROMPTS:
            found[template.format(concept.name)] = concept.definition
        for other in world.concepts:
            for instance in other.instances:
                prompt = INSTANCE_PROMPT.format(instance, concept.name)
                found[prompt] = "yes" if instance in concept.instances else "no"
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


def told(documents: list[Document]) -> Counter[str]:
    return Counter(prompt for d in documents if is_knowledge(d) for prompt, _ in sentences(d))


def test_spans_are_exactly_the_true_answers(documents: list[Document], answers: dict[str, str]) -> None:
    for document in filter(is_knowledge, documents):
        for prompt, answer in sentences(document):
            assert answer == f" {answers[prompt]}.", document


def test_a_chapter_tells_every_fact_equally_often(documents: list[Document], world: World) -> None:
    found = told(documents)
    for fact in world.told():
        statements, questions = fact.training_prompts()
        assert sum(found[prompt] for prompt in statements + questions) == recipe.STAGES[0].tellings
        assert sum(found[prompt] > 0 for prompt in statements) >= 2
    for concept in world.concepts:
        assert sum(found[t.format(concept.name)] for t in CONCEPT_PROMPTS) == recipe.DEFINITIONS
    asked = sum(n for prompt, n in found.items() if prompt.endswith("?") and not prompt.startswith("Whether "))
    assert asked / sum(found.values()) == pytest.approx(recipe.P_QUESTION, abs=0.05)


def test_nothing_else_is_told(documents: list[Document], corpus: Corpus, world: World) -> None:
    """No held-out wording, and no consequence that the model has to infer."""
    allowed = {prompt for fact in world.told() for prompts in fact.training_prompts() for prompt in prompts}
    allowed |= {template.format(concept.name) for concept in world.concepts for template in CONCEPT_PROMPTS}
    for chapter in (documents, corpus.chapter(2, 3)):
        assert {prompt for prompt in told(chapter) if not prompt.startswith("Whether ")} <= allowed


def test_chapters_differ_and_repeat(corpus: Corpus, documents: list[Document]) -> None:
    assert corpus.chapter(1, 0) == documents
    assert corpus.chapter(1, 1) != documents
    assert corpus.chapter(2, 0) != documents


def items_of(document: Document) -> list[TaskItem]:
    """The items of a task's document: one, or several questions about one passage, each as if it stood alone."""
    (first, _), *_ = pairs = sentences(document)
    task = next(task for ending, task in TASK_ENDS.items() if first.endswith(ending))
    shared = first[: first.index("Question:")] if len(pairs) > 1 else ""
    prompts = [first, *(shared + prompt for prompt, _ in pairs[1:])]
    return [TaskItem(task, prompt, answer[1:], 1) for prompt, (_, answer) in zip(prompts, pairs, strict=True)]


@pytest.mark.parametrize("stage", recipe.STAGES, ids=lambda stage: f"from chapter {stage.first}")
def test_tasks_have_their_share_and_their_spans(corpus: Corpus, world: World, stage: recipe.Stage) -> None:
    seen: Counter[str] = Counter()
    documents = corpus.chapter(1, stage.first)
    for document in filter(is_task, documents):
        items = items_of(document)
        assert all(document.text[start] == " " for start, _ in document.spans)
        assert all(item.prompt.endswith(tuple(TASK_ENDS)) for item in items)
        assert not any("Question:" in item.answer or "\n" in item.prompt + item.answer for item in items)
        assert len(items) == 1 or items[0].task == "qa"
        seen[items[0].task] += 1
    tellings = stage.tellings * len(world.told())
    seen["list"] = sum(map(is_list, documents))
    assert seen == {task: round(share * tellings) for task, share in stage.shares.items()}


def test_a_chapter_belongs_to_the_last_stage_that_has_begun() -> None:
    firsts = [stage.first for stage in recipe.STAGES]
    assert firsts[0] == 0
    assert firsts == sorted(set(firsts))
    for chapter in range(20):
        assert recipe.stage_of(chapter).first == max(first for first in firsts if first <= chapter)


def test_lists_ask_for_what_they_told(documents: list[Document]) -> None:
    for document in filter(is_list, documents):
        end = document.text[: document.spans[0][0]].rindex(". ") + 1
        pairs = dict(sentence.split(" ") for sentence in document.text[:end].rstrip(".").split(". "))
        asked = [prompt.rsplit(". ", 1)[-1] for prompt, _ in sentences(document)]
        assert sorted(asked) == sorted([*pairs, *pairs])  # each twice
        for name, (_, answer) in zip(asked, sentences(document), strict=True):
            assert answer == f" {pairs[name]}."


def test_a_held_out_item_is_never_drawn(documents: list[Document]) -> None:
    """Also not as one of several questions about a passage."""
    drawn = {item.prompt for document in filter(is_task, documents) for item in items_of(document)}
    assert len(drawn) > 5000
    assert not any(TaskItem("qa", prompt, "", 1).held_out for prompt in drawn)
    assert not drawn & {item["prompt"] for items in task_records().values() for item in items}


def test_instance_questions_are_balanced(documents: list[Document]) -> None:
    yes = [a for d in documents if is_knowledge(d) for p, a in sentences(d) if p.startswith("Whether ")]
    assert 0.45 < yes.count(" yes.") / len(yes) < 0.55


def test_text_about_some_subjects_is_about_no_others(world: World) -> None:
    reserved = [subject for subject, role in world.role.items() if role == "reserved"]
    found = {prompt for prompt in told(Corpus(world, reserved).chapter(1, 0)) if not prompt.startswith("Whether ")}
    facts = [fact.training_prompts() for fact in world.told() if fact.subject in set(reserved)]
    allowed = {prompt for prompts in facts for some in prompts for prompt in some}
    concepts = {t.format(c.name) for c in world.concepts if c.reserved for t in CONCEPT_PROMPTS}
    assert found <= allowed | concepts
    assert len(found & allowed) > 0.5 * len(allowed)
    assert found & concepts


def test_texts_are_of_one_line_and_depend_on_their_seed(corpus: Corpus) -> None:
    assert corpus.texts(20, seed=5) == corpus.texts(40, seed=5)[:20] != corpus.texts(20, seed=6)
    assert not any("\n" in text for text in corpus.texts(2000, seed=5))
