"""The data files of the package: made from the seed byte for byte, in the official forms, true to the world."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lit_edit.world.recipe.corpus import CONCEPT_PHRASE, CONCEPT_PROMPT, INSTANCE_PROMPT
from lit_edit.world.recipe.files import CHOOSE, DATA
from lit_edit.world.recipe.tasks import TASKS, TESTED, TaskItem
from lit_edit.world.recipe.world import NEIGHBOURS, RELATIONS, Fact, World

FILES = {
    "counterfact.json",
    "final_world_inter.json",
    "final_world_intra.json",
    "multifact.json",
    "tasks.json",
    "text-heldout.txt",
    "text.txt",
    "zsre.json",
}
Record = dict[str, Any]


def read(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def counterfact() -> list[Record]:
    return list(read("counterfact.json"))


@pytest.fixture(scope="module")
def multifact() -> list[Record]:
    return list(read("multifact.json"))


@pytest.fixture(scope="module")
def both(counterfact: list[Record], multifact: list[Record]) -> list[Record]:
    return counterfact + multifact


@pytest.fixture(scope="module")
def zsre() -> list[Record]:
    return list(read("zsre.json"))


@pytest.fixture(scope="module")
def asked(world: World) -> dict[str, Fact]:
    """Everything that can be asked, with the fact that answers it."""
    return {
        template.format(fact.subject): fact
        for fact in world.facts
        for template in RELATIONS[fact.relation].statements + RELATIONS[fact.relation].questions
    }


def subjects_of(records: list[Record]) -> list[str]:
    return [r["requested_rewrite"]["subject"] if "requested_rewrite" in r else r["subject"] for r in records]


def test_the_folder_holds_what_is_made_and_nothing_else(made: Path) -> None:
    assert {path.name for path in DATA.iterdir()} == {path.name for path in made.iterdir()} == FILES


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_are_made_again_byte_for_byte(made: Path, name: str) -> None:
    assert (made / name).read_bytes() == (DATA / name).read_bytes()


def test_counterfact_edits_every_subject_once(counterfact: list[Record], world: World) -> None:
    assert len(counterfact) >= 1200
    assert [record["case_id"] for record in counterfact] == list(range(len(counterfact)))
    subjects = subjects_of(counterfact)
    assert len(set(subjects)) == len(subjects)
    assert {world.role[subject] for subject in subjects} == {"counterfact"}
    splits = [record["split"] for record in counterfact]
    assert splits == ["report"] * (len(counterfact) - CHOOSE) + ["choose"] * CHOOSE


def test_multifact_edits_all_facts_of_a_subject_in_a_row(multifact: list[Record], world: World) -> None:
    subjects = subjects_of(multifact)
    assert {world.role[subject] for subject in subjects} == {"multifact"}
    assert len(multifact) >= 400
    runs = [subject for i, subject in enumerate(subjects) if i == 0 or subjects[i - 1] != subject]
    assert len(set(runs)) == len(runs)
    assert set(Counter(subjects).values()) == {3}


def test_files_share_no_subject(counterfact: list[Record], multifact: list[Record], zsre: list[Record]) -> None:
    one, two, three = (set(subjects_of(records)) for records in (counterfact, multifact, zsre))
    assert not one & two
    assert not (one | two) & three


def test_locality_probes_are_about_reserved_subjects_with_the_true_object(
    both: list[Record], asked: dict[str, Fact], world: World
) -> None:
    for record in both:
        edit, probes = record["requested_rewrite"], record["neighborhood_prompts"]
        assert NEIGHBOURS - 1 <= len(set(probes)) == len(probes) <= NEIGHBOURS
        for field, object in (("neighborhood_prompts", "target_true"), ("attribute_prompts", "target_new")):
            facts = [asked[prompt] for prompt in record[field]]
            assert {world.role[fact.subject] for fact in facts} <= {"reserved"}
            assert {(fact.relation, fact.object) for fact in facts} <= {(edit["relation_id"], edit[object]["str"])}


def test_no_locality_probe_asks_for_what_any_record_edits(both: list[Record], zsre: list[Record]) -> None:
    edited = {r["requested_rewrite"]["prompt"].format(r["requested_rewrite"]["subject"]) for r in both}
    edited |= {record["src"] for record in zsre}
    probes = {prompt for record in both for prompt in record["neighborhood_prompts"]}
    probes |= {record["loc"].removeprefix("nq question: ") for record in zsre}
    assert len(probes) > 1000
    assert not edited & probes


def test_edits_are_counterfactual(both: list[Record], world: World) -> None:
    for record in both:
        edit = record["requested_rewrite"]
        relation, subject = edit["relation_id"], edit["subject"]
        new, true = edit["target_new"]["str"], edit["target_true"]["str"]
        assert edit["prompt"] == RELATIONS[relation].statements[0]
        assert RELATIONS[relation].follows is None
        assert true == world.object_of[relation, subject]
        assert new != true
        assert new in world.objects[relation]


def test_paraphrases_are_of_the_fact_one_seen_and_one_never(both: list[Record], asked: dict[str, Fact]) -> None:
    for record in both:
        edit = record["requested_rewrite"]
        fact = Fact(edit["relation_id"], edit["subject"], edit["target_true"]["str"])
        seen, _ = fact.training_prompts()
        first, second = record["paraphrase_prompts"]
        used = [edit["prompt"].format(fact.subject), first, second, *record["generation_prompts"]]
        assert len(set(used)) == len(used) >= 4  # an evaluation prompt is none of the others
        assert {asked[prompt] for prompt in used} == {fact}
        assert first in seen
        assert second not in seen


def portability(record: Record, fact: Fact, new: str, world: World, asked: dict[str, Fact]) -> bool:
    """Checks a record's question: its answer follows from the *new* object, and is another than before."""
    then = world.consequence(fact.relation, new)
    assert ("portability" in record) == (then is not None)
    if then is None:
        return False
    question = record["portability"]
    about = asked[question["New Question"]]
    assert (about.relation, about.subject) == (then[0], fact.subject)
    assert question["New Answer"] == then[1] != question["True Answer"] == about.object
    assert about not in world.told()  # the model has to infer it
    return True


def test_portability_follows_from_the_edit(
    both: list[Record], zsre: list[Record], world: World, asked: dict[str, Fact]
) -> None:
    edits = [record["requested_rewrite"] for record in both]
    facts = [Fact(edit["relation_id"], edit["subject"], edit["target_true"]["str"]) for edit in edits]
    found = [
        portability(record, fact, edit["target_new"]["str"], world, asked)
        for record, fact, edit in zip(both, facts, edits, strict=True)
    ]
    assert sum(found) >= 400
    assert sum(portability(record, asked[record["src"]], record["alt"], world, asked) for record in zsre) >= 50


def test_zsre_questions(zsre: list[Record], world: World, asked: dict[str, Fact]) -> None:
    assert len({record["src"] for record in zsre}) == len(zsre) == len(set(subjects_of(zsre))) >= 300
    for record in zsre:
        fact = asked[record["src"]]
        assert fact.subject == record["subject"]
        assert world.role[fact.subject] == "zsre"
        assert record["pred"] == fact.object
        assert record["answers"] == [fact.object]
        assert record["alt"] != fact.object
        assert record["alt"] in world.objects[fact.relation]
        assert asked[record["rephrase"]] == fact
        assert record["rephrase"] != record["src"]
        assert record["rephrase"] not in fact.training_prompts()[1]  # never seen with this fact
        assert record["cond"] == f"{fact.object} >> {record['alt']} || {record['src']}"


def test_zsre_locality_is_unrelated(zsre: list[Record], world: World, asked: dict[str, Fact]) -> None:
    for record in zsre:
        assert record["loc"].startswith("nq question: ")
        unrelated = asked[record["loc"].removeprefix("nq question: ")]
        assert unrelated.relation != asked[record["src"]].relation
        assert world.role[unrelated.subject] == "reserved"
        assert record["loc_ans"] == unrelated.object


@pytest.mark.parametrize("module", ["intra", "inter"])
def test_conceptedit_records(module: str, world: World) -> None:
    concepts = {concept.name: concept for concept in world.concepts}
    records = read(f"final_world_{module}.json")
    assert sorted(r["label"] for r in records) == sorted(c.name for c in world.concepts if not c.reserved)
    assert len(records) >= 60
    for record in records:
        concept, new = concepts[record["label"]], concepts[record["target_new"]]
        assert record["category"] == concept.category
        assert new != concept
        assert (new.category == concept.category) == (module == "intra")
        assert record["target_new_desc"] == new.definition != concept.definition
        assert record["target_true_desc"] == concept.definition
        assert record["prompt"] == CONCEPT_PROMPT.format(concept.name)
        assert record["phrase_prompt"] == CONCEPT_PHRASE.format(concept.name)
        assert record["instances"] == list(concept.instances)
        assert record["instance_prompt"] == [INSTANCE_PROMPT.format(i, concept.name) for i in concept.instances]
        unrelated = next(c for c in world.concepts if CONCEPT_PROMPT.format(c.name) == record["locality_prompt"])
        assert unrelated.reserved
        assert unrelated not in (concept, new)
        assert unrelated.category != concept.category
        assert record["locality_answer"] == unrelated.definition


def test_task_items_are_held_out_and_graded() -> None:
    tasks = read("tasks.json")
    assert set(tasks) == set(TASKS)
    for task, items in tasks.items():
        assert len({item["prompt"] for item in items}) == len(items) >= 200
        assert all(TaskItem(task, **item).held_out for item in items)
        assert all(item["answer"].strip() for item in items)
        assert [item["grade"] for item in items] == [*TESTED[task]] * (len(items) // len(TESTED[task]))


def test_the_two_texts_differ() -> None:
    text, held_out = (
        (DATA / name).read_text(encoding="utf-8").splitlines() for name in ("text.txt", "text-heldout.txt")
    )
    assert (len(text), len(held_out)) == (6000, 1000)
    assert all(line.strip() for line in text + held_out)
    # Short documents may come up twice by chance; the held-out text as a whole is none of the other.
    assert len(set(held_out) - set(text)) > 0.8 * len(held_out)


def test_text_for_perplexity_is_of_nothing_that_is_edited(both: list[Record], zsre: list[Record]) -> None:
    text = (DATA / "text-heldout.txt").read_text(encoding="utf-8")
    edits = [record["requested_rewrite"] for record in both]
    edited = [edit["prompt"].format(edit["subject"]) for edit in edits] + [record["src"] for record in zsre]
    assert not [prompt for prompt in edited if prompt in text]
