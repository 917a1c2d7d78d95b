"""Relations of the embedded world: how each is said and asked, and which facts it holds.

Every template ends where the object begins, so that a prompt is a template filled with a subject. The first statement
of a relation is its edit prompt, the others are paraphrases; the first question is the ZsRE form's ``src``.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from lit_edit.world import knowledge as k

WORLD_SEED = 1


@dataclass(frozen=True)
class Relation:
    """One relation: its templates (``{}`` stands for the subject) and whether it can be edited.

    ``derived`` relations follow from others (the country of a birth city): they are learnt, and serve as portability
    probes, but are no edit requests of their own.
    """

    id: str
    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    derived: bool = False


@dataclass(frozen=True)
class Fact:
    """``subject`` stands in ``relation`` to ``object``."""

    relation: str
    subject: str
    object: str

    @property
    def number(self) -> int:
        """A number that depends on the fact alone; decides which templates are kept from training."""
        return random.Random(f"{self.relation}|{self.subject}").randrange(1 << 30)


def _r(id: str, name: str, statements: str, questions: str, derived: bool = False) -> Relation:
    def split(text: str) -> tuple[str, ...]:
        return tuple(line.strip() for line in text.strip().splitlines())

    return Relation(id, name, split(statements), split(questions), derived)


RELATIONS: tuple[Relation, ...] = (
    _r(
        "P19",
        "place of birth",
        """{} was born in
        {} first saw the light of day in
        The birthplace of {} is
        {} originally comes from
        The family of {} still lives in the home town,
        {} is a native of""",
        """In which city was {} born?
        What is the birthplace of {}?
        Which city does {} come from?""",
    ),
    _r(
        "P106",
        "occupation",
        """{} earns a living as a trained
        By profession {} is a qualified
        The occupation of {} is that of
        {} has worked for years as a
        The trade that {} learnt is that of
        {} is employed as a skilled""",
        """What is the occupation of {}?
        What does {} do for a living?
        Which profession does {} have?""",
    ),
    _r(
        "P108",
        "employer",
        """{} is employed by
        {} works for
        The employer of {} is
        {} draws a salary from
        {} has signed a contract with
        Every morning {} goes to the offices of""",
        """Who is the employer of {}?
        Which organisation does {} work for?
        Who pays the salary of {}?""",
    ),
    _r(
        "P103",
        "native language",
        """The mother tongue of {} is
        {} grew up speaking
        The first language of {} is
        {} is a native speaker of
        At home {} talks in
        As a child {} spoke only""",
        """What is the mother tongue of {}?
        Which language did {} grow up with?
        What is the first language of {}?""",
    ),
    _r(
        "P1303",
        "instrument",
        """{} plays music on the
        In the orchestra {} plays the
        The instrument that {} practises is the
        {} has mastered the
        {} gave a concert on the
        Friends love to hear {} play the""",
        """Which instrument does {} play?
        On what instrument does {} make music?
        What does {} play in the orchestra?""",
    ),
    _r(
        "P641",
        "sport",
        """{} is a keen player of the sport of
        The favourite sport of {} is
        On weekends {} trains for
        {} won a medal in
        {} spends every free hour on
        The club of {} is devoted to""",
        """Which sport does {} practise?
        What is the favourite sport of {}?
        In what sport did {} win a medal?""",
    ),
    _r(
        "P36",
        "capital",
        """The capital of {} is
        The seat of government of {} is in
        {} is governed from its capital,
        The parliament of {} meets in
        The embassies in {} stand in
        The chief city of {} is its capital""",
        """What is the capital of {}?
        Which city is the capital of {}?
        From which city is {} governed?""",
    ),
    _r(
        "P30",
        "continent",
        """{} is a country on the continent of
        {} lies in
        {} belongs to the continent of
        On a map {} is found in
        The continent that {} is part of is
        Geographically {} is a part of""",
        """On which continent is {}?
        Which continent does {} belong to?
        What continent is {} found on?""",
    ),
    _r(
        "P38",
        "currency",
        """The currency of {} is the
        In {} people pay with the
        The money used in {} is the
        Prices in {} are given in the
        Shops in {} accept the
        The central bank of {} issues the""",
        """What is the currency of {}?
        Which currency is used in {}?
        What money do people in {} pay with?""",
    ),
    _r(
        "P37",
        "official language",
        """The official language of {} is
        In {} people speak
        Laws in {} are written in
        Schools in {} teach in
        The language heard in the streets of {} is
        Newspapers in {} are printed in""",
        """What is the official language of {}?
        Which language is spoken in {}?
        In what language are the laws of {} written?""",
    ),
    _r(
        "P17",
        "country",
        """The city of {} is located in
        {} is a city in
        The country that {} belongs to is
        {} can be found in
        A traveller to {} has to go to
        The people of {} are citizens of""",
        """In which country is {}?
        Which country does {} belong to?
        To what country must one go to see {}?""",
    ),
    _r(
        "P246",
        "element symbol",
        """The chemical symbol of {} is
        Chemists write {} as
        In the periodic table {} stands as
        The letters used for {} are
        In a formula {} is written
        The sign of {} in the table of elements is""",
        """What is the chemical symbol of {}?
        How do chemists write {}?
        Which letters stand for {}?""",
    ),
    _r(
        "P31e",
        "element family",
        """The element {} is classed as a kind of
        In chemistry {} counts as a member of the family
        The family of {} in the periodic table is
        {} shares its column with every other
        Chemists group {} under the heading
        The type of element that {} belongs to is""",
        """What kind of element is {}?
        To which family does {} belong?
        How is {} classed in chemistry?""",
    ),
    _r(
        "P515",
        "state at room temperature",
        """At room temperature {} is a
        In a warm room {} exists as a
        The normal state of {} is that of a
        Left on a table, {} would be a
        Under normal conditions {} forms a
        In daily life one meets {} as a""",
        """What state is {} in at room temperature?
        As what does {} exist in a warm room?
        In which state is {} normally found?""",
    ),
    _r(
        "P31p",
        "kind of planet",
        """The planet {} is a
        Astronomers describe the planet {} as a
        Among the planets {} counts as a
        The kind of world that {} is, is a
        A probe sent to {} would find a
        By its make-up the planet {} is a""",
        """What kind of planet is {}?
        How do astronomers describe the planet {}?
        What would a probe find at {}?""",
    ),
    _r(
        "P1545",
        "place among the planets",
        """Counted from the Sun, the planet {} is the
        In the order of the planets {} comes
        The place of {} among the planets is the
        Seen from the Sun, {} is planet number
        The orbit of {} is, counted outwards, the
        In the solar system {} holds the place that is""",
        """Which place does the planet {} have from the Sun?
        Counted from the Sun, which planet is {}?
        In what place does {} come among the planets?""",
    ),
    _r(
        "P61",
        "known for",
        """{} is remembered for the
        The world owes to {} the
        The great achievement of {} was the
        {} gave the world the
        The name of {} is tied to the
        Pupils learn that {} is known for the""",
        """What is {} remembered for?
        What does the world owe to {}?
        What was the great achievement of {}?""",
    ),
    _r(
        "P101",
        "field of work",
        """The field in which {} worked is
        {} was a leading mind in
        {} devoted a lifetime to
        The subject of {} was
        {} wrote many papers on
        Students of {} were trained in""",
        """In which field did {} work?
        What was the subject of {}?
        To what field did {} devote a lifetime?""",
    ),
    _r(
        "P27",
        "nationality",
        """The nationality of {} was
        By birth {} was
        The passport of {} would have been
        {} is described in books as
        History books call {}
        The people {} came from were""",
        """What was the nationality of {}?
        Of which nationality was {}?
        What do history books call {}?""",
    ),
    _r(
        "P495",
        "country of a company",
        """The company {} is based in
        The headquarters of {} are found in
        {} is a company from
        {} was founded in
        The home country of the company {} is
        The board of {} meets in""",
        """In which country is the company {} based?
        Which country does the company {} come from?
        Where was the company {} founded?""",
    ),
    _r(
        "P452",
        "industry",
        """The industry of {} is
        {} is active in the business of
        {} makes its money in
        The company {} operates in
        The main business of {} is
        Investors know {} for its work in""",
        """In which industry is {} active?
        What is the main business of {}?
        How does {} make its money?""",
    ),
    _r(
        "P159",
        "head office",
        """The head office of {} is in
        {} has its main building in
        The directors of {} meet in
        Letters to {} are sent to
        {} runs its affairs from
        The staff of {} come to work in""",
        """In which city is the head office of {}?
        Where does {} have its main building?
        From which city does {} run its affairs?""",
    ),
    _r(
        "P19c",
        "country of birth",
        """The country in which {} was born is
        {} was born in a city of the country""",
        """In which country was {} born?""",
        derived=True,
    ),
    _r(
        "P108c",
        "city of the employer",
        """The employer of {} has its head office in
        The firm that pays {} is run from""",
        """In which city is the employer of {}?""",
        derived=True,
    ),
    _r(
        "P742",
        "pen name",
        """The person behind the pen name {} is
        {} is a pen name of""",
        """Who writes under the name {}?""",
        derived=True,
    ),
)
BY_ID = {relation.id: relation for relation in RELATIONS}
PERSON_RELATIONS = ("P19", "P106", "P108", "P103", "P1303", "P641")


@dataclass(frozen=True)
class World:
    """All facts of the world; the same in every process.

    ``people`` and ``organisations`` are the generated subjects, ``alias_of`` maps a pen name to its person.
    """

    facts: tuple[Fact, ...]
    people: tuple[str, ...]
    organisations: tuple[str, ...]
    alias_of: dict[str, str] = field(default_factory=dict)

    def of(self, relation: str) -> list[Fact]:
        """The facts of one relation, in order."""
        return [f for f in self.facts if f.relation == relation]

    def object_of(self, relation: str, subject: str) -> str:
        """The one object of a subject under a relation."""
        for fact in self.facts:
            if fact.relation == relation and fact.subject == subject:
                return fact.object
        raise KeyError(f"{subject!r} has no {relation}.")


def _people(rng: random.Random, n: int) -> list[str]:
    """Names of two and three parts in which every part, and most pairs of parts, are shared with other people."""
    names: list[str] = []
    pairs = [f"{a} {b}" for a in k.FIRST_NAMES for b in k.FAMILY_NAMES]
    rng.shuffle(pairs)
    names += pairs[: n // 2]
    seen = set(names)
    middle, last = k.FAMILY_NAMES[:16], k.FAMILY_NAMES[16:32]
    while len(names) < n:
        name = f"{rng.choice(k.FIRST_NAMES[:16])} {rng.choice(middle)} {rng.choice(last)}"
        if name not in seen:
            seen.add(name)
            names.append(name)
    return names


def _deal(rng: random.Random, subjects: Sequence[str], objects: Sequence[str]) -> dict[str, str]:
    """Deals objects to subjects so that each object comes up equally often, give or take one."""
    cards = [objects[i % len(objects)] for i in range(len(subjects))]
    rng.shuffle(cards)
    return dict(zip(subjects, cards, strict=True))


def build_world(n_people: int = 240, seed: int = WORLD_SEED) -> World:
    """Real facts from `knowledge` and generated people and organisations.

    Args:
        n_people: generated people, each with six facts.
        seed: of the generated part.
    """
    rng = random.Random(seed)
    facts: list[Fact] = []
    country_of: dict[str, str] = {}
    for country, capital, continent, currency, language in k.rows(k.COUNTRIES):
        country_of[capital] = country
        facts += [
            Fact("P36", country, capital),
            Fact("P30", country, continent),
            Fact("P38", country, currency),
            Fact("P37", country, language),
        ]
    for country, cities in k.rows(k.CITIES):
        for city in cities.split(", "):
            country_of[city] = country
            facts.append(Fact("P17", city, country))
    for element, symbol, family, state in k.rows(k.ELEMENTS):
        facts += [Fact("P246", element, symbol), Fact("P31e", element, family), Fact("P515", element, state)]
    for planet, kind, place in k.rows(k.PLANETS):
        facts += [Fact("P31p", planet, kind), Fact("P1545", planet, place)]
    for person, work, subject_field, nationality in k.rows(k.INVENTORS):
        facts += [Fact("P61", person, work), Fact("P101", person, subject_field), Fact("P27", person, nationality)]
    for company, country, industry in k.rows(k.COMPANIES):
        facts += [Fact("P495", company, country), Fact("P452", company, industry)]

    organisations = [f"{a} {b}" for a in k.ORGANISATION_FIRST for b in k.ORGANISATION_SECOND]
    head_office = _deal(rng, organisations, k.BIRTH_CITIES)
    for organisation, industry in _deal(rng, organisations, k.INDUSTRIES).items():
        facts += [Fact("P159", organisation, head_office[organisation]), Fact("P452", organisation, industry)]

    people = _people(rng, n_people)
    employers = rng.sample(organisations, 20)
    dealt = {
        "P19": _deal(rng, people, k.BIRTH_CITIES),
        "P106": _deal(rng, people, k.OCCUPATIONS),
        "P108": _deal(rng, people, employers),
        "P103": _deal(rng, people, k.LANGUAGES),
        "P1303": _deal(rng, people, k.INSTRUMENTS),
        "P641": _deal(rng, people, k.SPORTS),
    }
    for person in people:
        facts += [Fact(r, person, dealt[r][person]) for r in PERSON_RELATIONS]
        facts.append(Fact("P19c", person, country_of[dealt["P19"][person]]))
        facts.append(Fact("P108c", person, head_office[dealt["P108"][person]]))

    aliases = [f"the {a} {b}" for a in k.ALIASES_FIRST for b in k.ALIASES_SECOND]
    alias_of = dict(zip(aliases, rng.sample(people, len(aliases)), strict=True))
    for alias, person in alias_of.items():
        facts.append(Fact("P742", alias, person))
        facts += [Fact(r, alias, dealt[r][person]) for r in PERSON_RELATIONS]
    return World(tuple(facts), tuple(people), tuple(organisations), alias_of)


def objects_by_relation(world: World) -> dict[str, list[str]]:
    """The distinct objects of every relation, in order of appearance."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for fact in world.facts:
        found[fact.relation][fact.object] = None
    return {relation: list(objects) for relation, objects in found.items()}


def held_out_statement(fact: Fact) -> int:
    """Index of the paraphrase under which the model never sees this fact in training (0, the edit prompt, never)."""
    n = len(BY_ID[fact.relation].statements)
    return 1 + fact.number % (n - 1)


def held_out_question(fact: Fact) -> int | None:
    """Index of the question never seen with this fact in training, where the relation has three."""
    n = len(BY_ID[fact.relation].questions)
    return 1 + (fact.number // 7) % (n - 1) if n > 2 else None
