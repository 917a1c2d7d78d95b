"""The facts of the world: common knowledge from ``knowledge.yaml``, and invented people, towns and organisations.

Every subject has one role. Facts about *reserved* subjects are never edited, and every locality probe is about one of
them. Subjects of the role *counterfact* are edited once, in one fact; those of *multifact* in every fact; *zsre* has
subjects of its own. What follows from two facts (the country of a birth city) is told of reserved subjects only, so
that for the others the model has to put it together, and an edit can be asked for its consequences.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

Role = Literal["reserved", "counterfact", "multifact", "zsre"]
# Shares of the invented subjects of each kind; what is left over is reserved.
SHARES: dict[Role, float] = {"counterfact": 0.46, "multifact": 0.055, "zsre": 0.105}
RESERVED_COMMON = 0.6  # share of the subjects of common knowledge, which share their objects with few others
NEIGHBOURS = 6  # locality probes of a record, and how many reserved subjects an object needs at least, less one


@dataclass(frozen=True)
class Size:
    """How large a world and its model are."""

    people: int
    towns: int
    organisations: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int


SIZES = {
    "base": Size(1560, 540, 440, layers=8, hidden=384, intermediate=1152, heads=6, kv_heads=3, vocabulary=2048),
    "large": Size(13000, 3500, 3500, layers=24, hidden=1024, intermediate=2816, heads=16, kv_heads=8, vocabulary=2048),
}


@dataclass(frozen=True)
class Relation:
    """One relation with its templates, in which ``{}`` stands for the subject.

    ``of`` names the kinds of subject that have it. ``follows`` is given where it is a consequence of two others.
    """

    id: str
    name: str
    of: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    follows: tuple[str, str] | None = None


@dataclass(frozen=True)
class Fact:
    """``subject`` stands in ``relation`` to ``object``."""

    relation: str
    subject: str
    object: str

    @property
    def _number(self) -> int:
        return random.Random(f"{self.relation}|{self.subject}").randrange(1 << 30)

    @property
    def held_out_statement(self) -> int:
        """Index of the paraphrase that training never uses for this fact; 0, the edit prompt, is always used."""
        return 1 + self._number % (len(RELATIONS[self.relation].statements) - 1)

    @property
    def held_out_question(self) -> int:
        """Index of the question that training never uses for this fact; never 0."""
        return 1 + (self._number // 7) % (len(RELATIONS[self.relation].questions) - 1)

    def training_prompts(self) -> tuple[list[str], list[str]]:
        """(statements, questions) of training, the subject filled in: all of a consequence, else all but one each."""
        relation = RELATIONS[self.relation]
        statements, questions = list(relation.statements), list(relation.questions)
        if relation.follows is None:
            del statements[self.held_out_statement], questions[self.held_out_question]
        return [s.format(self.subject) for s in statements], [q.format(self.subject) for q in questions]


def read_data(name: str) -> Any:
    """A data file of the recipe."""
    return yaml.safe_load((Path(__file__).parent / f"{name}.yaml").read_text(encoding="utf-8"))


def _relations() -> dict[str, Relation]:
    def tuples(entry: dict[str, Any]) -> dict[str, Any]:
        return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}

    return {id: Relation(id, **tuples(entry)) for id, entry in read_data("relations").items()}


RELATIONS = _relations()
# Facts of an invented subject, by its role: one that is edited once needs one fact more, to show what else it loses.
FACTS_EACH: dict[Role, int] = {"reserved": 3, "counterfact": 2, "multifact": 3, "zsre": 2}


@dataclass(frozen=True)
class Concept:
    """A thing with a category, a definition and instances."""

    category: str
    name: str
    definition: str
    instances: tuple[str, ...]
    reserved: bool


@dataclass(frozen=True)
class World:
    """All facts, the same in every process.

    Attributes:
        facts: Facts and consequences of every subject.
        invented: The invented subjects by kind.
        role: The role of every subject.
        concepts: What the ConceptEdit files are about; one of each category is reserved.
    """

    facts: tuple[Fact, ...]
    invented: dict[str, list[str]]
    role: dict[str, Role]
    concepts: tuple[Concept, ...]

    @cached_property
    def object_of(self) -> dict[tuple[str, str], str]:
        """Objects by (relation, subject)."""
        return {(f.relation, f.subject): f.object for f in self.facts}

    @cached_property
    def reserved(self) -> dict[tuple[str, str], list[str]]:
        """The reserved subjects by (relation, object)."""
        found: dict[tuple[str, str], list[str]] = defaultdict(list)
        for fact in self.facts:
            if self.role[fact.subject] == "reserved":
                found[fact.relation, fact.object].append(fact.subject)
        return found

    @cached_property
    def objects(self) -> dict[str, list[str]]:
        """The distinct objects of every relation, in order of appearance."""
        found: dict[str, dict[str, None]] = defaultdict(dict)
        for fact in self.facts:
            found[fact.relation][fact.object] = None
        return {relation: list(objects) for relation, objects in found.items()}

    def editable(self, role: Role) -> list[Fact]:
        """The facts, without consequences, about subjects of a role."""
        return [f for f in self.facts if self.role[f.subject] == role and RELATIONS[f.relation].follows is None]

    def consequence(self, relation: str, object: str) -> tuple[str, str] | None:
        """(relation, object) of what follows if a subject has this object; None if nothing does."""
        for derived in RELATIONS.values():
            if derived.follows is not None and derived.follows[0] == relation:
                return derived.id, self.object_of[derived.follows[1], object]
        return None

    def told(self) -> list[Fact]:
        """The facts that training tells: all but consequences for subjects that are edited."""
        return [f for f in self.facts if RELATIONS[f.relation].follows is None or self.role[f.subject] == "reserved"]


def _names(rng: random.Random, kind: str, n: int, parts: dict[str, list[str]]) -> list[str]:
    """``n`` distinct names of one kind, whose parts are shared with other names."""
    if kind == "people":  # half of them with a middle name
        pairs = [" ".join(pair) for pair in itertools.product(parts["first"], parts["family"])]
        short = rng.sample(pairs, min(n // 2, len(pairs) // 2))
        names = dict.fromkeys(short)
        while len(names) < n:
            names[f"{rng.choice(parts['first'])} {' '.join(rng.sample(parts['family'], 2))}"] = None
        return rng.sample(list(names), n)
    if kind == "towns":
        made = (f"{a} {b}{c}" for a, b, c in itertools.product(parts["town"], parts["stem"], parts["ending"]))
    else:
        firsts = itertools.permutations(parts["organisation"], 2)
        made = (f"{a} {b} {c}" for (a, b), c in itertools.product(firsts, parts["business"]))
    return rng.sample(list(made), n)


def _deal(rng: random.Random, subjects: Sequence[str], objects: Sequence[str]) -> dict[str, str]:
    """Deals objects to subjects so that each object comes up equally often, give or take one."""
    cards = [objects[i % len(objects)] for i in range(len(subjects))]
    rng.shuffle(cards)
    return dict(zip(subjects, cards, strict=True))


def _common_facts(knowledge: dict[str, Any]) -> list[Fact]:
    facts: list[Fact] = []
    columns = {
        "countries": ("P36", "P30", "P38", "P37"),
        "elements": ("P246", "P31e", "P515"),
        "planets": ("P31p", "P1545"),
        "inventors": ("P61", "P101", "P27"),
        "companies": ("P495", "P452"),
    }
    for table, relations in columns.items():
        for subject, *objects in knowledge[table]:
            facts += [Fact(r, subject, o) for r, o in zip(relations, objects, strict=True)]
    facts += [Fact("P17", capital, country) for country, capital, *_ in knowledge["countries"]]
    facts += [Fact("P17", city, country) for country, cities in knowledge["cities"].items() for city in cities]
    return facts


def _common_roles(rng: random.Random, facts: list[Fact], pinned: set[str]) -> dict[str, Role]:
    """Roles of real subjects: edited are those, in the smaller part, whose object enough reserved ones share."""
    subjects = list(dict.fromkeys(f.subject for f in facts))
    role: dict[str, Role] = {
        s: "reserved" if s in pinned or rng.random() < RESERVED_COMMON else "zsre" for s in subjects
    }
    sharing: dict[tuple[str, str], int] = defaultdict(int)
    for fact in facts:
        sharing[fact.relation, fact.object] += role[fact.subject] == "reserved"
    for fact in facts:
        if role[fact.subject] == "zsre" and sharing[fact.relation, fact.object] >= NEIGHBOURS - 1:
            role[fact.subject] = "counterfact"
    return role


def build_world(size: Size = SIZES["base"], seed: int = 2) -> World:
    """Common knowledge and invented subjects, two or three facts each.

    Args:
        size: Numbers of invented subjects.
        seed: Seed of names, roles and objects.
    """
    rng = random.Random(seed)
    knowledge = read_data("knowledge")
    dealt: dict[str, list[str]] = knowledge["objects"]
    facts = _common_facts(knowledge)
    # Second hops must stay as they are: cities and countries that consequences lead through are reserved.
    pinned = {o for r in RELATIONS.values() if r.follows for o in dealt.get(r.follows[0], ())}
    role = _common_roles(rng, facts, pinned)

    invented: dict[str, list[str]] = {}
    for kind in ("organisations", "towns", "people"):
        names = invented[kind] = _names(rng, kind, getattr(size, kind), knowledge["names"])
        dealing = [role_ for role_, share in SHARES.items() for _ in range(round(share * len(names)))]
        role |= dict(itertools.zip_longest(names, dealing, fillvalue="reserved"))  # the names are in random order
        if kind == "organisations":
            dealt["P108"] = [name for name in names if role[name] == "reserved"][:20]
        relations = [r.id for r in RELATIONS.values() if kind in r.of and r.follows is None]
        having: dict[tuple[str, Role], list[str]] = defaultdict(list)
        for name in names:
            for relation in sorted(rng.sample(relations, FACTS_EACH[role[name]])):
                having[relation, role[name]].append(name)
        for (relation, _), subjects in having.items():  # by role, so that all objects have reserved subjects
            facts += [Fact(relation, s, o) for s, o in _deal(rng, subjects, dealt[relation]).items()]

    concepts = []
    for category, members in knowledge["concepts"].items():
        reserved = rng.choice(list(members))
        for name, (definition, instances) in members.items():
            concepts.append(Concept(category, name, definition, tuple(instances), name == reserved))
    world = World(tuple(facts), invented, role, tuple(concepts))
    following = [(f, world.consequence(f.relation, f.object)) for f in facts]
    facts += [Fact(c[0], f.subject, c[1]) for f, c in following if c is not None]
    return World(tuple(facts), invented, role, tuple(concepts))
