"""The facts of the world are consistent: with one another, with everybody's role, and over two hops."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from lit_edit.world.recipe.world import (
    FACTS_EACH,
    NEIGHBOURS,
    RELATIONS,
    SIZES,
    Fact,
    Size,
    World,
    build_world,
    read_data,
)

STATED = [relation for relation in RELATIONS.values() if relation.follows is None]
INVENTED = ("people", "towns", "organisations")
KNOWLEDGE = read_data("knowledge")
REAL = {row[0] for table in ("countries", "elements", "planets", "inventors", "companies") for row in KNOWLEDGE[table]}


def test_the_world_is_the_same_every_time_and_depends_on_its_seed(world: World) -> None:
    assert build_world() == world
    assert build_world(seed=3).facts != world.facts


def test_a_subject_has_one_object_per_relation(world: World) -> None:
    twice = [key for key, n in Counter((f.relation, f.subject) for f in world.facts).items() if n > 1]
    assert twice == []
    assert {f.relation for f in world.facts} == set(RELATIONS)
    assert all(f.object.strip() == f.object != "" and f.subject.strip() == f.subject != "" for f in world.facts)


def test_no_prompt_has_two_answers(world: World) -> None:
    """Subjects of different kinds may share a name, and relations a wording, but never so that a prompt is unclear."""
    answers: dict[str, set[str]] = defaultdict(set)
    for fact in world.facts:
        relation = RELATIONS[fact.relation]
        for template in relation.statements + relation.questions:
            answers[template.format(fact.subject)].add(fact.object)
    assert {prompt: found for prompt, found in answers.items() if len(found) > 1} == {}


def test_templates_have_one_place_for_the_subject_and_are_distinct() -> None:
    for relation in RELATIONS.values():
        templates = relation.statements + relation.questions
        assert all(template.count("{}") == 1 for template in templates), relation.id
        assert len(set(templates)) == len(templates), relation.id
        if relation.follows is None:
            assert len(relation.statements) >= 4  # the edit prompt, two paraphrases, and one to spare
            assert len(relation.questions) >= 2


def test_everybody_has_one_role_and_the_facts_that_go_with_it(world: World) -> None:
    assert set(world.role) == {fact.subject for fact in world.facts}
    facts = Counter(f.subject for f in world.facts if RELATIONS[f.relation].follows is None)
    for kind in INVENTED:
        assert len(world.invented[kind]) == getattr(SIZES["base"], kind)
        assert all(facts[name] == FACTS_EACH[world.role[name]] for name in world.invented[kind])
    roles = Counter(world.role.values())
    assert roles["reserved"] >= 1000
    assert roles["counterfact"] >= 1200
    assert sum(roles.values()) >= 2400


def test_what_consequences_lead_through_is_reserved(world: World) -> None:
    """Or an edit would change the consequences of others."""
    for relation in RELATIONS.values():
        if relation.follows is None:
            continue
        first, second = relation.follows
        through = {fact.object for fact in world.facts if fact.relation == first}
        assert {world.role[subject] for subject in through if (second, subject) in world.object_of} == {"reserved"}


def test_consequences_agree_with_the_two_facts_they_follow_from(world: World) -> None:
    derived = [fact for fact in world.facts if RELATIONS[fact.relation].follows is not None]
    assert len(derived) > 1000
    for fact in derived:
        first, second = RELATIONS[fact.relation].follows or ("", "")
        assert fact.object == world.object_of[second, world.object_of[first, fact.subject]]
        assert world.consequence(first, world.object_of[first, fact.subject]) == (fact.relation, fact.object)
    assert world.consequence("P1303", "violin") is None


def test_training_tells_consequences_of_reserved_subjects_only(world: World) -> None:
    told = set(world.told())
    for fact in world.facts:
        inferred = RELATIONS[fact.relation].follows is not None and world.role[fact.subject] != "reserved"
        assert (fact in told) == (not inferred)


def parts_of(name: str, kind: str) -> list[str]:
    """Words; of a town's second word, which is made of two parts, these."""
    words = name.split()
    if kind != "towns":
        return words
    ((stem, ending),) = {
        (stem, ending)
        for stem in KNOWLEDGE["names"]["stem"]
        for ending in KNOWLEDGE["names"]["ending"]
        if words[1] == stem + ending
    }
    return [words[0], stem, ending]


def test_every_part_of_a_name_is_shared(world: World) -> None:
    """No single part gives a subject away, so it has to be put together before it can be looked up."""
    for kind in INVENTED:
        names = world.invented[kind]
        assert len(set(names)) == len(names)
        assert min(Counter(part for name in names for part in parts_of(name, kind)).values()) >= 2, kind
    lengths = Counter(len(person.split()) for person in world.invented["people"])
    assert set(lengths) == {2, 3}
    assert min(lengths.values()) > 0.4 * len(world.invented["people"])


def test_objects_are_dealt_evenly_within_a_role(world: World) -> None:
    """Otherwise the most frequent object would be a good guess without knowing the subject."""
    kinds = {name: kind for kind in INVENTED for name in world.invented[kind]}
    dealt: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for fact in world.facts:
        if fact.subject in kinds and RELATIONS[fact.relation].follows is None:
            dealt[kinds[fact.subject], fact.relation, world.role[fact.subject]][fact.object] += 1
    for counts in dealt.values():
        assert max(counts.values()) - min(counts.values()) <= 1


def test_an_object_that_is_edited_has_reserved_subjects(world: World) -> None:
    """Its locality probes are about these."""
    edited = [f for role in ("counterfact", "multifact") for f in world.editable(role) if f.subject not in REAL]  # type: ignore[arg-type]
    enough = sum(len(world.reserved.get((f.relation, f.object), ())) >= NEIGHBOURS - 1 for f in edited)
    assert enough > 0.98 * len(edited)


def test_real_facts_are_taken_over_as_they_stand(world: World) -> None:
    for country, *objects in KNOWLEDGE["countries"]:
        found = [world.object_of[relation, country] for relation in ("P36", "P30", "P38", "P37")]
        assert found == objects
        assert world.object_of["P17", objects[0]] == country


def test_concepts_are_complete_and_distinct(world: World) -> None:
    concepts = world.concepts
    assert all(concept.category and concept.name and concept.definition for concept in concepts)
    assert len({concept.name for concept in concepts}) == len(concepts)
    assert len({concept.definition for concept in concepts}) == len(concepts)
    instances = [instance for concept in concepts for instance in concept.instances]
    assert len(set(instances)) == len(instances)  # an instance belongs to one concept: yes/no questions are clear
    # An intra edit needs a second concept, and every category has one that is never edited.
    assert min(Counter(concept.category for concept in concepts).values()) >= 3
    reserved = Counter(concept.category for concept in concepts if concept.reserved)
    assert reserved == dict.fromkeys({concept.category for concept in concepts}, 1)


def test_held_out_templates_are_never_the_edit_prompt_and_vary_between_facts(world: World) -> None:
    statements: dict[str, set[int]] = defaultdict(set)
    for fact in world.facts:
        relation = RELATIONS[fact.relation]
        if relation.follows is not None:
            continue
        assert 1 <= fact.held_out_statement < len(relation.statements)
        assert 1 <= fact.held_out_question < len(relation.questions)
        statements[fact.relation].add(fact.held_out_statement)
    # Held out for some facts, a template is learnt from others: a paraphrase is unseen with its fact, not unknown.
    for relation in STATED:
        if relation.of[0] in INVENTED:
            assert statements[relation.id] == set(range(1, len(relation.statements)))


def test_training_prompts_are_all_but_the_held_out_ones(world: World) -> None:
    for fact in world.facts:
        relation = RELATIONS[fact.relation]
        statements = [template.format(fact.subject) for template in relation.statements]
        questions = [template.format(fact.subject) for template in relation.questions]
        if relation.follows is None:
            del statements[fact.held_out_statement], questions[fact.held_out_question]
        assert fact.training_prompts() == (statements, questions)


def test_objects_are_listed_once(world: World) -> None:
    assert all(len(set(found)) == len(found) >= 2 for found in world.objects.values())
    assert set(world.objects["P17"]) >= {row[0] for row in KNOWLEDGE["countries"]}


@pytest.mark.parametrize("size", [Size(60, 24, 60, 2, 16, 24, 2, 1, 512), SIZES["large"]])
def test_worlds_of_other_sizes_hold_together(size: Size) -> None:
    other = build_world(size)
    assert {kind: len(names) for kind, names in other.invented.items()} == {
        kind: getattr(size, kind) for kind in INVENTED
    }
    keys = [(f.relation, f.subject) for f in other.facts]
    assert len(set(keys)) == len(keys)
    assert Fact("P36", "France", "Paris") in other.facts
