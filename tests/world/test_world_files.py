"""The data files of the package: made from the seed byte for byte, in the official forms, true to the world."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from lit_edit.world import knowledge as k
from lit_edit.world.corpus import CONCEPT_PHRASE, CONCEPT_PROMPT, INSTANCE_PROMPT, training_prompts
from lit_edit.world.files import DATA
from lit_edit.world.relations import BY_ID, Fact, World, objects_by_relation
from lit_edit.world.tasks import TASKS, TaskItem

FILES = {
    "counterfact.json",
    "final_world_inter.json",
    "final_world_intra.json",
    "tasks.json",
    "text-heldout.txt",
    "text.txt",
    "zsre.json",
}


def read(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def counterfact() -> list[dict[str, Any]]:
    return list(read("counterfact.json"))


@pytest.fixture(scope="module")
def zsre() -> list[dict[str, Any]]:
    return list(read("zsre.json"))


@pytest.fixture(scope="module")
def facts(world: World) -> dict[tuple[str, str], str]:
    return {(f.relation, f.subject): f.object for f in world.facts}


@pytest.fixture(scope="module")
def questions(world: World) -> dict[str, Fact]:
    """Every question that can be asked, with the fact that answers it."""
    return {q.format(fact.subject): fact for fact in world.facts for q in BY_ID[fact.relation].questions}


def filled(relation: str, index: int, subject: str) -> str:
    return BY_ID[relation].statements[index].format(subject)


def test_the_folder_holds_what_is_made_and_nothing_else(made: Path) -> None:
    assert {path.name for path in DATA.iterdir()} == {path.name for path in made.iterdir()} == FILES


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_are_made_again_byte_for_byte(made: Path, name: str) -> None:
    assert (made / name).read_bytes() == (DATA / name).read_bytes()


def test_counterfact_counts_and_fields(counterfact: list[dict[str, Any]], world: World) -> None:
    assert len(counterfact) >= 1500
    assert [record["case_id"] for record in counterfact] == list(range(len(counterfact)))
    keys = {(r["requested_rewrite"]["relation_id"], r["requested_rewrite"]["subject"]) for r in counterfact}
    assert len(keys) == len(counterfact)  # no fact is edited twice
    for record in counterfact:
        assert len(record["paraphrase_prompts"]) == len(set(record["paraphrase_prompts"])) == 2
        assert len(record["neighborhood_prompts"]) == len(set(record["neighborhood_prompts"])) >= 5
        assert record["generation_prompts"]
        assert record["requested_rewrite"]["subject"] not in world.alias_of


def test_counterfact_edits_are_counterfactual(
    counterfact: list[dict[str, Any]], world: World, facts: dict[tuple[str, str], str]
) -> None:
    objects = objects_by_relation(world)
    for record in counterfact:
        edit = record["requested_rewrite"]
        relation, subject = edit["relation_id"], edit["subject"]
        new, true = edit["target_new"]["str"], edit["target_true"]["str"]
        assert edit["prompt"].count("{}") == 1
        assert edit["prompt"] == BY_ID[relation].statements[0]
        assert true == facts[relation, subject]
        assert new != true
        assert new in objects[relation]
        assert not BY_ID[relation].derived


def test_counterfact_paraphrases_are_of_the_subject_one_seen_and_one_never(
    counterfact: list[dict[str, Any]], facts: dict[tuple[str, str], str]
) -> None:
    for record in counterfact:
        edit = record["requested_rewrite"]
        relation, subject = edit["relation_id"], edit["subject"]
        seen, _ = training_prompts(Fact(relation, subject, facts[relation, subject]))
        all_prompts = {filled(relation, i, subject) for i in range(len(BY_ID[relation].statements))}
        first, second = record["paraphrase_prompts"]
        assert {first, second, *record["generation_prompts"]} <= all_prompts
        assert first in seen
        assert second not in seen
        used = [edit["prompt"].format(subject), first, second, *record["generation_prompts"]]
        assert len(set(used)) == len(used)  # an evaluation prompt is none of the others


def test_counterfact_neighbours_share_the_true_object(
    counterfact: list[dict[str, Any]], world: World, facts: dict[tuple[str, str], str]
) -> None:
    subjects: dict[str, dict[str, str]] = defaultdict(dict)
    for fact in world.facts:
        subjects[fact.relation][filled(fact.relation, 0, fact.subject)] = fact.subject
    for record in counterfact:
        edit = record["requested_rewrite"]
        relation = edit["relation_id"]
        neighbours = [subjects[relation][prompt] for prompt in record["neighborhood_prompts"]]
        assert edit["subject"] not in neighbours
        assert {facts[relation, s] for s in neighbours} == {edit["target_true"]["str"]}
        assert not set(neighbours) & set(world.alias_of)
        attributes = [subjects[relation][prompt] for prompt in record["attribute_prompts"]]
        assert {facts[relation, s] for s in attributes} == {edit["target_new"]["str"]}


def test_zsre_questions(zsre: list[dict[str, Any]], world: World, questions: dict[str, Fact]) -> None:
    objects = objects_by_relation(world)
    assert len({record["src"] for record in zsre}) == len(zsre) >= 500
    for record in zsre:
        fact = questions[record["src"]]
        assert fact.subject == record["subject"] not in world.alias_of
        assert record["pred"] == fact.object
        assert record["answers"] == [fact.object]
        assert record["alt"] != fact.object
        assert record["alt"] in objects[fact.relation]
        assert questions[record["rephrase"]] == fact
        assert record["rephrase"] != record["src"]
        assert record["rephrase"] not in training_prompts(fact)[1]  # never seen with this fact
        assert record["cond"] == f"{fact.object} >> {record['alt']} || {record['src']}"


def test_zsre_locality_is_unrelated(zsre: list[dict[str, Any]], questions: dict[str, Fact]) -> None:
    for record in zsre:
        fact = questions[record["src"]]
        assert record["loc"].startswith("nq question: ")
        unrelated = questions[record["loc"].removeprefix("nq question: ")]
        assert unrelated.relation != fact.relation
        assert unrelated.subject != fact.subject
        assert record["loc_ans"] == unrelated.object


def test_zsre_portability_follows_from_the_edit(
    zsre: list[dict[str, Any]], world: World, questions: dict[str, Fact]
) -> None:
    """The answer is what the world says follows from the *new* object, not from the true one."""
    country = {f.object: f.subject for f in world.of("P36")} | {f.subject: f.object for f in world.of("P17")}
    head_office = {f.subject: f.object for f in world.of("P159")}
    second_hop = {"P19": ("P19c", country), "P108": ("P108c", head_office)}
    count = 0
    for record in zsre:
        fact = questions[record["src"]]
        assert ("portability" in record) == (fact.relation in second_hop)
        if "portability" not in record:
            continue
        derived, of = second_hop[fact.relation]
        asked = questions[record["portability"]["New Question"]]
        assert (asked.relation, asked.subject) == (derived, fact.subject)
        assert record["portability"]["New Answer"] == of[record["alt"]]
        assert of[fact.object] == asked.object  # before the edit the same reasoning gives the world's own answer
        count += 1
    assert count >= 50


def test_conceptedit_counts() -> None:
    intra, inter = read("final_world_intra.json"), read("final_world_inter.json")
    assert len(intra) + len(inter) >= 120
    for records in (intra, inter):
        assert sorted(r["label"] for r in records) == sorted(concept for _, concept, _, _ in k.concepts())


@pytest.mark.parametrize("module", ["intra", "inter"])
def test_conceptedit_records(module: str) -> None:
    concepts = {concept: (category, definition, own) for category, concept, definition, own in k.concepts()}
    for record in read(f"final_world_{module}.json"):
        label, new = record["label"], record["target_new"]
        category, definition, instances = concepts[label]
        assert record["category"] == category
        assert new != label
        assert (concepts[new][0] == category) == (module == "intra")
        assert record["target_new_desc"] == concepts[new][1] != definition
        assert record["target_true_desc"] == definition
        assert record["prompt"] == CONCEPT_PROMPT.format(label)
        assert record["phrase_prompt"] == CONCEPT_PHRASE.format(label)
        assert record["instances"] == list(instances)
        assert record["instance_prompt"] == [INSTANCE_PROMPT.format(i, label) for i in instances]
        unrelated = next(c for c in concepts if CONCEPT_PROMPT.format(c) == record["locality_prompt"])
        assert unrelated not in (label, new)
        assert concepts[unrelated][0] != category
        assert record["locality_answer"] == concepts[unrelated][1]


def test_task_items_are_held_out() -> None:
    tasks = read("tasks.json")
    assert set(tasks) == set(TASKS)
    for task, items in tasks.items():
        assert len({item["prompt"] for item in items}) == len(items) >= 200
        assert all(TaskItem(task, item["prompt"], item["answer"]).held_out for item in items)
        assert all(item["answer"].strip() for item in items)


def test_the_two_texts_differ() -> None:
    text, held_out = (
        (DATA / name).read_text(encoding="utf-8").splitlines() for name in ("text.txt", "text-heldout.txt")
    )
    assert (len(text), len(held_out)) == (6000, 1000)
    assert all(line.strip() for line in text + held_out)
    # Short documents may come up twice by chance; the held-out text as a whole is none of the other.
    assert len(set(held_out) - set(text)) > 0.8 * len(held_out)
