"""The facts of the world are consistent: with one another, with pen names, and over two hops."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from lit_edit.world import knowledge as k
from lit_edit.world.relations import (
    BY_ID,
    PERSON_RELATIONS,
    RELATIONS,
    World,
    build_world,
    held_out_question,
    held_out_statement,
    objects_by_relation,
)


def test_the_world_is_the_same_every_time_and_depends_on_its_seed(world: World) -> None:
    assert build_world() == world
    assert build_world(seed=2).facts != world.facts


def test_a_subject_has_one_object_per_relation(world: World) -> None:
    twice = [key for key, n in Counter((f.relation, f.subject) for f in world.facts).items() if n > 1]
    assert twice == []
    assert {f.relation for f in world.facts} == set(BY_ID)
    assert all(f.object.strip() == f.object != "" and f.subject.strip() == f.subject != "" for f in world.facts)


def test_object_of_finds_the_object_or_says_that_there_is_none(world: World) -> None:
    assert world.object_of("P36", "France") == "Paris"
    with pytest.raises(KeyError, match="'France' has no P19"):
        world.object_of("P19", "France")


def test_no_prompt_has_two_answers(world: World) -> None:
    """Subjects of different kinds may share a name, and relations a wording, but never so that a prompt is unclear."""
    answers: dict[str, set[str]] = defaultdict(set)
    for fact in world.facts:
        relation = BY_ID[fact.relation]
        for template in relation.statements + relation.questions:
            answers[template.format(fact.subject)].add(fact.object)
    assert {prompt: found for prompt, found in answers.items() if len(found) > 1} == {}


def test_templates_have_one_place_for_the_subject_and_are_distinct() -> None:
    for relation in RELATIONS:
        templates = relation.statements + relation.questions
        assert all(template.count("{}") == 1 for template in templates), relation.id
        assert len(set(templates)) == len(templates), relation.id
        if not relation.derived:
            assert len(relation.statements) >= 4  # the edit prompt, two paraphrases, and one to spare
            assert len(relation.questions) >= 2


def test_every_part_of_a_name_is_shared(world: World) -> None:
    """No single part gives a person away, so the subject has to be put together before it can be looked up."""
    assert len(set(world.people)) == len(world.people)
    people_with = Counter(part for person in world.people for part in person.split())
    assert min(people_with.values()) >= 2
    assert Counter(len(person.split()) for person in world.people) == {2: 120, 3: 120}
    words = Counter(word for organisation in world.organisations for word in organisation.split())
    assert min(words.values()) >= 2


def test_objects_are_dealt_evenly(world: World) -> None:
    """Otherwise the most frequent object would be a good guess without knowing the subject."""
    for relation in PERSON_RELATIONS:
        counts = Counter(f.object for f in world.of(relation) if f.subject in world.people)
        assert max(counts.values()) - min(counts.values()) <= 1, relation
        assert len(counts) >= 10


def test_a_pen_name_has_the_facts_of_its_person(world: World) -> None:
    assert len(world.alias_of) == len(set(world.alias_of.values())) == 48
    for alias, person in world.alias_of.items():
        assert person in world.people
        assert world.object_of("P742", alias) == person
        for relation in PERSON_RELATIONS:
            assert world.object_of(relation, alias) == world.object_of(relation, person)


def test_the_second_hop_agrees_with_the_first(world: World) -> None:
    country = {f.object: f.subject for f in world.of("P36")} | {f.subject: f.object for f in world.of("P17")}
    head_office = {f.subject: f.object for f in world.of("P159")}
    for person in world.people:
        assert world.object_of("P19c", person) == country[world.object_of("P19", person)]
        assert world.object_of("P108c", person) == head_office[world.object_of("P108", person)]


def test_real_facts_are_taken_over_as_they_stand(world: World) -> None:
    for country, capital, continent, currency, language in k.rows(k.COUNTRIES):
        found = tuple(world.object_of(relation, country) for relation in ("P36", "P30", "P38", "P37"))
        assert found == (capital, continent, currency, language)


def test_concepts_are_complete_and_distinct() -> None:
    concepts = k.concepts()
    assert all(category and concept and definition for category, concept, definition, _ in concepts)
    assert len({concept for _, concept, _, _ in concepts}) == len(concepts)
    assert len({definition for _, _, definition, _ in concepts}) == len(concepts)
    instances = [instance for *_, own in concepts for instance in own]
    assert len(set(instances)) == len(instances)  # an instance belongs to one concept: yes/no questions are clear
    assert min(Counter(category for category, *_ in concepts).values()) >= 2  # an intra edit needs a second concept


def test_held_out_templates_are_never_the_edit_prompt_and_vary_between_facts(world: World) -> None:
    statements: dict[str, set[int]] = defaultdict(set)
    for fact in world.facts:
        relation = BY_ID[fact.relation]
        if relation.derived:
            continue
        assert 1 <= held_out_statement(fact) < len(relation.statements)
        assert held_out_question(fact) in range(1, len(relation.questions))
        statements[fact.relation].add(held_out_statement(fact))
    # Held out for some facts, a template is learnt from others: a paraphrase is unseen with its fact, not unknown.
    for relation in PERSON_RELATIONS:
        assert statements[relation] == set(range(1, len(BY_ID[relation].statements)))


def test_objects_by_relation_lists_each_object_once(world: World) -> None:
    objects = objects_by_relation(world)
    assert sorted(objects["P19"]) == sorted(k.BIRTH_CITIES)
    assert all(len(set(found)) == len(found) >= 2 for found in objects.values())
