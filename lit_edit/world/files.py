"""Writes the world in the official file forms: `python -m lit_edit.world.files` remakes ``lit_edit/world/data``.

``counterfact.json`` (original CounterFact form), ``zsre.json`` (the form of the MEND release, with portability),
``final_world_intra.json`` and ``final_world_inter.json`` (ConceptEdit), ``tasks.json`` (held-out task items) and
``text.txt`` (running text for key covariances) with ``text-heldout.txt`` (for perplexity).
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from lit_edit.world import knowledge as k
from lit_edit.world.corpus import CONCEPT_PHRASE, CONCEPT_PROMPT, INSTANCE_PROMPT, Corpus
from lit_edit.world.relations import (
    BY_ID,
    Fact,
    World,
    build_world,
    held_out_question,
    held_out_statement,
    objects_by_relation,
)
from lit_edit.world.tasks import TASKS, held_out_items

DATA = Path(__file__).parent / "data"
NEIGHBOURS = 6


def _rng(*parts: str) -> random.Random:
    return random.Random("|".join(parts))


def _other_object(fact: Fact, objects: dict[str, list[str]]) -> str:
    choices = [o for o in objects[fact.relation] if o != fact.object]
    return _rng("new", fact.relation, fact.subject).choice(choices)


def counterfact_records(world: World) -> list[dict[str, Any]]:
    """CounterFact's original form: every editable fact whose object at least five other subjects share.

    Of the two paraphrases the first was seen in training with this fact, the second never; both are templates the model
    knows from other facts. Neighbourhood prompts ask the same relation of other subjects with the same true object.
    """
    objects = objects_by_relation(world)
    sharing: dict[tuple[str, str], list[str]] = defaultdict(list)
    for fact in world.facts:
        if fact.subject not in world.alias_of:
            sharing[fact.relation, fact.object].append(fact.subject)
    facts = [f for f in world.facts if not BY_ID[f.relation].derived and f.subject not in world.alias_of]
    _rng("counterfact").shuffle(facts)
    records: list[dict[str, Any]] = []
    for fact in facts:
        relation = BY_ID[fact.relation]
        others = [s for s in sharing[fact.relation, fact.object] if s != fact.subject]
        if len(others) < 5:
            continue
        rng = _rng("counterfact", fact.relation, fact.subject)
        unseen = held_out_statement(fact)
        seen = [i for i in range(1, len(relation.statements)) if i != unseen]
        rng.shuffle(seen)
        new = _other_object(fact, objects)
        attributes = list(sharing[fact.relation, new])
        edit = relation.statements[0]
        records.append(
            {
                "case_id": len(records),
                "requested_rewrite": {
                    "prompt": edit,
                    "relation_id": relation.id,
                    "target_new": {"str": new},
                    "target_true": {"str": fact.object},
                    "subject": fact.subject,
                },
                "paraphrase_prompts": [relation.statements[i].format(fact.subject) for i in (seen[0], unseen)],
                "neighborhood_prompts": [edit.format(s) for s in rng.sample(others, min(NEIGHBOURS, len(others)))],
                "attribute_prompts": [edit.format(s) for s in rng.sample(attributes, min(NEIGHBOURS, len(attributes)))],
                "generation_prompts": [relation.statements[i].format(fact.subject) for i in seen[1:3]],
            }
        )
    return records


def zsre_records(world: World) -> list[dict[str, Any]]:
    """ZsRE in the form of the MEND release: a question, its rephrasing, and an unrelated question for locality."""
    objects = objects_by_relation(world)
    editable = [f for f in world.facts if not BY_ID[f.relation].derived and f.subject not in world.alias_of]
    by_relation: dict[str, list[Fact]] = defaultdict(list)
    for fact in editable:
        by_relation[fact.relation].append(fact)
    chosen: list[Fact] = []
    for relation_facts in by_relation.values():
        chosen += _rng("zsre", relation_facts[0].relation).sample(relation_facts, min(40, len(relation_facts)))
    _rng("zsre").shuffle(chosen)
    records: list[dict[str, Any]] = []
    for fact in chosen:
        relation = BY_ID[fact.relation]
        rng = _rng("zsre", fact.relation, fact.subject)
        unseen = held_out_question(fact)
        rephrase = relation.questions[unseen if unseen is not None else 1].format(fact.subject)
        while True:
            loc = rng.choice(editable)
            if loc.relation != fact.relation and loc.subject != fact.subject:
                break
        src, new = relation.questions[0].format(fact.subject), _other_object(fact, objects)
        record: dict[str, Any] = {
            "subject": fact.subject,
            "src": src,
            "pred": fact.object,
            "rephrase": rephrase,
            "alt": new,
            "answers": [fact.object],
            "loc": "nq question: " + BY_ID[loc.relation].questions[0].format(loc.subject),
            "loc_ans": loc.object,
            "cond": f"{fact.object} >> {new} || {src}",
        }
        derived = {"P19": "P19c", "P108": "P108c"}.get(fact.relation)
        if derived is not None:
            ask = BY_ID[derived].questions[0].format(fact.subject)
            example = next(f for f in world.of(fact.relation) if f.object == new and f.subject in world.people)
            answer = world.object_of(derived, example.subject)
            record["portability"] = {
                "Recalled Relation": f"({new}, {BY_ID[derived].name}, {answer})",
                "New Question": ask,
                "New Answer": answer,
            }
        records.append(record)
    return records


def concept_records(module: str) -> list[dict[str, Any]]:
    """ConceptEdit: a concept gets the definition of another, of its own category (intra) or of another one (inter)."""
    all_concepts = k.concepts()
    records: list[dict[str, Any]] = []
    for category, concept, definition, instances in all_concepts:
        rng = _rng("concept", module, concept)
        pool = [c for c in all_concepts if c[1] != concept and (c[0] == category) == (module == "intra")]
        _, new_concept, new_definition, _ = rng.choice(pool)
        unrelated = rng.choice([c for c in all_concepts if c[1] not in (concept, new_concept) and c[0] != category])
        records.append(
            {
                "label": concept,
                "category": category,
                "prompt": CONCEPT_PROMPT.format(concept),
                "phrase_prompt": CONCEPT_PHRASE.format(concept),
                "target_true_desc": definition,
                "target_new": new_concept,
                "target_new_desc": new_definition,
                "instances": list(instances),
                "instance_prompt": [INSTANCE_PROMPT.format(i, concept) for i in instances],
                "locality_prompt": CONCEPT_PROMPT.format(unrelated[1]),
                "locality_answer": unrelated[2],
            }
        )
    _rng("concept", module).shuffle(records)
    return records


def task_records(n: int = 200) -> dict[str, list[dict[str, str]]]:
    """Held-out items of every task."""
    return {t: [{"prompt": i.prompt, "answer": i.answer} for i in held_out_items(t, n)] for t in TASKS}


def write_files(folder: Path = DATA) -> None:
    """Writes every file of the world into a folder."""
    world = build_world()
    corpus = Corpus(world)
    folder.mkdir(parents=True, exist_ok=True)

    def dump(name: str, records: list[dict[str, Any]]) -> None:
        lines = ",\n".join(json.dumps(r, ensure_ascii=False) for r in records)
        (folder / name).write_text(f"[\n{lines}\n]\n", encoding="utf-8")

    dump("counterfact.json", counterfact_records(world))
    dump("zsre.json", zsre_records(world))
    for module in ("intra", "inter"):
        dump(f"final_world_{module}.json", concept_records(module))
    (folder / "tasks.json").write_text(
        json.dumps(task_records(), ensure_ascii=False, indent=0) + "\n", encoding="utf-8"
    )
    (folder / "text.txt").write_text("\n".join(corpus.texts(6000, seed=11)) + "\n", encoding="utf-8")
    (folder / "text-heldout.txt").write_text("\n".join(corpus.texts(1000, seed=12)) + "\n", encoding="utf-8")


def main() -> None:
    """Remakes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA)
    write_files(parser.parse_args().out)


if __name__ == "__main__":
    main()
