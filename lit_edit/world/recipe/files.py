"""Writes the world in the official file forms: `python -m lit_edit.world.recipe.files` remakes ``lit_edit/world/data``.

* ``counterfact.json``: original CounterFact form, one record per subject. The records of the field ``split`` that say
  ``choose``, the last of the file, are for choosing settings; tables report the others (``report``).
* ``multifact.json``: the same form, several facts of the same subject in a row; subjects of its own.
* ``zsre.json``: the form of the MEND release; subjects of its own.
* ``final_world_intra.json``, ``final_world_inter.json``: ConceptEdit.
* ``tasks.json``: held-out task items, each with its grade.
* ``text.txt``: running text for key covariances. ``text-heldout.txt``: text for perplexity, of what nothing edits.

Locality probes of all files are about reserved subjects (or concepts), which no record edits. Where an edit has a
consequence, the record has a ``portability`` question; its ``True Answer`` is the consequence of the true object.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from lit_edit.world.recipe.corpus import CONCEPT_PHRASE, CONCEPT_PROMPT, INSTANCE_PROMPT, Corpus
from lit_edit.world.recipe.tasks import TASKS, held_out_items
from lit_edit.world.recipe.world import NEIGHBOURS, RELATIONS, Fact, World, build_world

DATA = Path(__file__).parents[1] / "data"
CHOOSE = 200  # records of counterfact.json, at its end, on which settings are chosen
TASK_ITEMS = 240
Record = dict[str, Any]


def _rng(*parts: str) -> random.Random:
    return random.Random("|".join(parts))


def _new_object(world: World, fact: Fact) -> str:
    """Another object of the relation, and one with another consequence where there is any."""

    def consequence(object: str) -> tuple[str, str] | None:
        return world.consequence(fact.relation, object)

    true = consequence(fact.object)
    others = [o for o in world.objects[fact.relation] if o != fact.object and (true is None or consequence(o) != true)]
    return _rng("new", fact.relation, fact.subject).choice(others)


def _portability(world: World, fact: Fact, new: str) -> Record:
    """The field ``portability`` of a record, empty where nothing follows from the fact."""
    then, now = world.consequence(fact.relation, new), world.consequence(fact.relation, fact.object)
    if then is None or now is None:
        return {}
    derived = RELATIONS[then[0]]
    return {
        "portability": {
            "Recalled Relation": f"({new}, {derived.name}, {then[1]})",
            "New Question": derived.questions[0].format(fact.subject),
            "New Answer": then[1],
            "True Answer": now[1],
        }
    }


def _neighbours(world: World, fact: Fact) -> list[str]:
    return world.reserved.get((fact.relation, fact.object), [])


def _counterfact_record(world: World, fact: Fact, number: int) -> Record:
    """Of the two paraphrases the first was seen in training with this fact, the second never."""
    relation, rng = RELATIONS[fact.relation], _rng("counterfact", fact.relation, fact.subject)
    seen = [i for i in range(1, len(relation.statements)) if i != fact.held_out_statement]
    rng.shuffle(seen)
    new, edit = _new_object(world, fact), relation.statements[0]
    neighbours, others = _neighbours(world, fact), world.reserved.get((fact.relation, new), [])
    return {
        "case_id": number,
        "requested_rewrite": {
            "prompt": edit,
            "relation_id": relation.id,
            "target_new": {"str": new},
            "target_true": {"str": fact.object},
            "subject": fact.subject,
        },
        "paraphrase_prompts": [relation.statements[i].format(fact.subject) for i in (seen[0], fact.held_out_statement)],
        "neighborhood_prompts": [edit.format(s) for s in rng.sample(neighbours, min(NEIGHBOURS, len(neighbours)))],
        "attribute_prompts": [edit.format(s) for s in rng.sample(others, min(NEIGHBOURS, len(others)))],
        "generation_prompts": [relation.statements[i].format(fact.subject) for i in seen[1:3]],
        **_portability(world, fact, new),
    }


def counterfact_records(world: World) -> list[Record]:
    """One fact of every subject that has one whose object at least five reserved subjects share."""
    facts: dict[str, list[Fact]] = {}
    for fact in world.editable("counterfact"):
        if len(_neighbours(world, fact)) >= NEIGHBOURS - 1:
            facts.setdefault(fact.subject, []).append(fact)
    chosen = [_rng("choice", subject).choice(own) for subject, own in facts.items()]
    _rng("counterfact").shuffle(chosen)
    splits = ["report"] * (len(chosen) - CHOOSE) + ["choose"] * CHOOSE
    return [
        _counterfact_record(world, fact, i) | {"split": split}
        for i, (fact, split) in enumerate(zip(chosen, splits, strict=True))
    ]


def multifact_records(world: World) -> list[Record]:
    """Every fact of the subjects kept for it, subject by subject."""
    facts = sorted(world.editable("multifact"), key=lambda f: _rng("multifact", f.subject).random())
    return [_counterfact_record(world, fact, i) for i, fact in enumerate(facts)]


def zsre_records(world: World) -> list[Record]:
    """A question, its rephrasing that training never uses, and another question about a reserved subject."""
    facts: dict[str, list[Fact]] = {}
    for fact in world.editable("zsre"):
        facts.setdefault(fact.subject, []).append(fact)
    chosen = [_rng("zsre", subject).choice(own) for subject, own in facts.items()]
    _rng("zsre").shuffle(chosen)
    reserved = world.editable("reserved")
    records: list[Record] = []
    for fact in chosen:
        relation = RELATIONS[fact.relation]
        loc = _rng("loc", fact.subject).choice([f for f in reserved if f.relation != fact.relation])
        src, new = relation.questions[0].format(fact.subject), _new_object(world, fact)
        records.append(
            {
                "subject": fact.subject,
                "src": src,
                "pred": fact.object,
                "rephrase": relation.questions[fact.held_out_question].format(fact.subject),
                "alt": new,
                "answers": [fact.object],
                "loc": "nq question: " + RELATIONS[loc.relation].questions[0].format(loc.subject),
                "loc_ans": loc.object,
                "cond": f"{fact.object} >> {new} || {src}",
                **_portability(world, fact, new),
            }
        )
    return records


def concept_records(world: World, module: str) -> list[Record]:
    """ConceptEdit: a concept gets the definition of another, of its own category (intra) or of another one (inter)."""
    records: list[Record] = []
    for concept in world.concepts:
        if concept.reserved:
            continue
        rng = _rng("concept", module, concept.name)
        new = rng.choice(
            [c for c in world.concepts if c != concept and (c.category == concept.category) == (module == "intra")]
        )
        unrelated = rng.choice(
            [c for c in world.concepts if c.reserved and c.name != new.name and c.category != concept.category]
        )
        records.append(
            {
                "label": concept.name,
                "category": concept.category,
                "prompt": CONCEPT_PROMPT.format(concept.name),
                "phrase_prompt": CONCEPT_PHRASE.format(concept.name),
                "target_true_desc": concept.definition,
                "target_new": new.name,
                "target_new_desc": new.definition,
                "instances": list(concept.instances),
                "instance_prompt": [INSTANCE_PROMPT.format(i, concept.name) for i in concept.instances],
                "locality_prompt": CONCEPT_PROMPT.format(unrelated.name),
                "locality_answer": unrelated.definition,
            }
        )
    _rng("concept", module).shuffle(records)
    return records


def task_records(n: int = TASK_ITEMS) -> dict[str, list[Record]]:
    """Held-out items of every task."""
    return {
        t: [{"prompt": i.prompt, "answer": i.answer, "grade": i.grade} for i in held_out_items(t, n)] for t in TASKS
    }


def write_files(folder: Path = DATA) -> None:
    """Writes every file of the world into a folder."""
    world = build_world()
    folder.mkdir(parents=True, exist_ok=True)

    def dump(name: str, records: list[Record]) -> None:
        lines = ",\n".join(json.dumps(r, ensure_ascii=False) for r in records)
        (folder / name).write_text(f"[\n{lines}\n]\n", encoding="utf-8")

    dump("counterfact.json", counterfact_records(world))
    dump("multifact.json", multifact_records(world))
    dump("zsre.json", zsre_records(world))
    for module in ("intra", "inter"):
        dump(f"final_world_{module}.json", concept_records(world, module))
    tasks = json.dumps(task_records(), ensure_ascii=False, indent=0)
    (folder / "tasks.json").write_text(f"{tasks}\n", encoding="utf-8")
    reserved = [subject for subject, role in world.role.items() if role == "reserved"]
    for name, corpus, n in (("text", Corpus(world), 6000), ("text-heldout", Corpus(world, reserved), 1000)):
        (folder / f"{name}.txt").write_text("\n".join(corpus.texts(n, seed=len(name))) + "\n", encoding="utf-8")


def main() -> None:
    """Remakes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the files")
    write_files(parser.parse_args().out)


if __name__ == "__main__":
    main()
