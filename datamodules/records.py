"""The published forms of an edit record, each as a pure function from a dictionary to an `EditRequest`.

* `COUNTERFACT`, told by ``requested_rewrite``: Meng et al. 2022, "Locating and Editing Factual Associations in GPT".
* `MEND`, told by ``src`` and ``alt``: ZsRE as prepared by Mitchell et al. 2022, "Fast Model Editing at Scale".
* `CONCEPTEDIT`, told by ``label`` and ``target_new_desc``: Wang et al. 2024, "Editing Conceptual Knowledge for Large
  Language Models".
* `FLAT`, told by ``prompt`` and ``target_new``: the flat files of editing toolkits; KnowEdit (Zhang et al. 2024, "A
  Comprehensive Study of Knowledge Editing for Large Language Models"); anybody's own facts.

Rules that hold in all of them: an optional field that is absent, ``None``, blank or an empty list counts as not given;
fields without a meaning here are allowed and ignored; white space is taken off both ends of subjects and answers, but
only off the end of a prompt, because what precedes a prompt is part of it; ``{}`` in a prompt stands for the subject;
where a file records several acceptable answers, the first is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lit_edit.datamodules.files import Record

from lit_edit.requests import DISTRACTING, EditRequest, Probe, ProbeKind, RequestError

NQ_PREFIX = "nq question: "
"""What MEND's files put before each locality question (they come from Natural Questions)."""

LIST_FIELDS = frozenset(
    {
        "rephrase_prompt",
        "rephrases",
        "rephrase",
        "locality_prompt",
        "locality_ground_truth",
        "locality_answer",
        "phrase_prompt",
        "instance_prompt",
        "answers",
    }
)
"""The fields that may hold one text or several; in a CSV cell several are separated by ``" | "``."""


FLAT_FIELDS = (
    *("case_id", "prompt", "subject", "target_new", "target_true", "ground_truth", "relation_id", "relation"),
    *("rephrase_prompt", "rephrases", "rephrase", "locality_prompt", "locality_ground_truth"),
    *("locality", "portability"),
)
"""All fields that `flat_request` reads."""


@dataclass(frozen=True)
class Form:
    """A published form of a record.

    Args:
        name: Name of the form in an error message.
        fields: Fields it cannot do without, as an error message lists them.
        marks: Fields that tell this form from others: one of them is enough, so that
            a record that lacks a required field gets an error about that field.
        read: Turns a record, the words that locate it and the identifier to use if it has none into a request.
    """

    name: str
    fields: tuple[str, ...]
    marks: tuple[str, ...]
    read: Callable[[Record, str, str], EditRequest]

    def fits(self, record: Record) -> bool:
        """Whether the record is meant in this form."""
        return any(mark in record for mark in self.marks)

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.fields)})"


# ---------------------------------------------------------------------------------------------------- single fields


def refuse(source: str, field: str, why: str) -> RequestError:
    """The error for one field of one record."""
    return RequestError(f"{source}, field '{field}': {why}")


def _found(record: Record) -> str:
    return ", ".join(str(field) for field in record) or "none"


def _absent(value: Any) -> bool:
    """Whether an optional field is not given. Data sets whose records differ are often filled up with ``None``."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, Sequence) and not value)


def _checked(value: Any, source: str, field: str) -> str:
    """A text that is not blank."""
    if not isinstance(value, str):
        raise refuse(source, field, f"must be text, but is {value!r}.")
    if not value.strip():
        raise refuse(source, field, "is empty.")
    return value


def _text(record: Record, field: str, source: str, within: str = "") -> str:
    """A required text. ``within`` is the path of the record in the file's record (``requested_rewrite.``)."""
    if field not in record:
        raise refuse(source, within + field, f"is missing; the record has the fields: {_found(record)}.")
    value = record[field]
    if value is None:
        raise refuse(source, within + field, "is empty.")
    return _checked(value, source, within + field)


def _texts(record: Record, field: str, source: str) -> list[tuple[str, str]]:
    """The texts of an optional field that holds one or several, each after the path it stands at."""
    value = record.get(field)
    if _absent(value):
        return []
    if isinstance(value, str):
        return [(field, _checked(value, source, field))]
    if not isinstance(value, Sequence):
        raise refuse(source, field, f"must be text or a list of texts, but is {value!r}.")
    return [(path := f"{field}[{place}]", _checked(item, source, path)) for place, item in enumerate(value)]


def _answer(value: Any, source: str, field: str) -> str | None:
    """The first answer in a text, a list of answers, or a list of lists of aliases; ``None`` if there is none."""
    if value is None:
        return None
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, Sequence):
        return next((found for item in value if (found := _answer(item, source, field)) is not None), None)
    raise refuse(source, field, f"must be text, a list of texts or a list of such lists, but is {value!r}.")


def _object(record: Record, field: str, source: str) -> Record:
    """An optional field that holds named fields; empty if it is absent."""
    value = record.get(field)
    if _absent(value):
        return {}
    if not isinstance(value, dict):
        raise refuse(source, field, f"must be an object with named fields, but is {value!r}.")
    return value


# ---------------------------------------------------------------------------------------------- parts of a request


def _filled(prompt: str, subject: str) -> str:
    return prompt.replace("{}", subject).rstrip()


def _probes(
    kind: ProbeKind,
    prompts: Iterable[tuple[str, str]],
    subject: str,
    target: str | None = None,
    name: str = "",
    relation: str | None = None,
) -> list[Probe]:
    return [Probe(kind, _filled(prompt, subject), target, name, relation, path) for path, prompt in prompts]


def _paired_locality(
    record: Record, prompt_field: str, answer_field: str, subject: str, source: str, name: str
) -> list[Probe]:
    """Locality probes from a field of prompts and a field of as many answers, which may be absent."""
    prompts = _texts(record, prompt_field, source)
    answers: list[str | None] = [text.strip() for _, text in _texts(record, answer_field, source)]
    if not answers:
        answers = [None] * len(prompts)
    if len(answers) != len(prompts):
        raise refuse(source, answer_field, f"has {len(answers)} texts for the {len(prompts)} of '{prompt_field}'.")
    return [
        Probe("locality", _filled(prompt, subject), answer, name, field=path)
        for (path, prompt), answer in zip(prompts, answers, strict=True)
    ]


def _one_hop(record: Record, subject: str, source: str) -> list[Probe]:
    """The portability question that the one-hop extensions of CounterFact and ZsRE add to a record."""
    value = _object(record, "portability", source)
    if not value:
        return []
    question = _text(value, "New Question", source, "portability.")
    answer = _text(value, "New Answer", source, "portability.")
    return [
        Probe("portability", _filled(question, subject), answer.strip(), "one_hop", field="portability.New Question")
    ]


def _named_probes(record: Record, kind: ProbeKind, subject: str, source: str) -> list[Probe]:
    """KnowEdit's groups: ``{name: [{prompt, ground_truth}, ...]}``, or a single object instead of the list."""
    probes = []
    for name, group in _object(record, kind, source).items():
        if _absent(group):
            continue
        items = [group] if isinstance(group, dict) else group
        if not isinstance(items, Sequence) or isinstance(items, str):
            raise refuse(source, f"{kind}.{name}", f"must be a list of objects, but is {group!r}.")
        for place, item in enumerate(items):
            path = f"{kind}.{name}[{place}]"
            if not isinstance(item, dict):
                raise refuse(source, path, f"must be an object with a prompt, but is {item!r}.")
            prompt = _text(item, "prompt", source, f"{path}.")
            answer = _answer(item.get("ground_truth"), source, f"{path}.ground_truth")
            if answer is None and kind == "portability":
                # Out-of-scope prompts are judged by the unedited model; a consequence of the edit only by its answer.
                raise refuse(source, f"{path}.ground_truth", "is missing or empty.")
            probes.append(Probe(kind, _filled(prompt, subject), answer, name, field=f"{path}.prompt"))
    return probes


def _request(
    record: Record,
    source: str,
    default_id: str,
    *,
    prompt: tuple[str, str],
    subject: tuple[str, str],
    target_new: str,
    target_true: str | None,
    relation: str | None,
    probes: Iterable[Probe],
) -> EditRequest:
    """Assemble a request; prompt and subject come with the name of the field they were read from."""
    prompt_field, text = prompt
    subject_field, words = subject
    if words not in text:
        other_case = "; it does in another spelling of upper and lower case" if words.lower() in text.lower() else ""
        raise refuse(source, subject_field, f"{words!r} does not occur in '{prompt_field}', {text!r}{other_case}.")
    case_id = record.get("case_id")
    return EditRequest(
        case_id=default_id if case_id is None or str(case_id).strip() == "" else str(case_id),
        prompt=text,
        subject=words,
        target_new=target_new.strip(),
        target_true=target_true,
        relation=relation,
        probes=tuple(probes),
        source=source,
    )


# ------------------------------------------------------------------------------------------------------- the forms


def _rewrite_target(rewrite: Record, field: str, source: str) -> str | None:
    """``{"str": ..., "id": ...}``, or the text alone as some derived files have it."""
    value = rewrite.get(field)
    if isinstance(value, dict):
        return _text(value, "str", source, f"requested_rewrite.{field}.").strip()
    return None if value is None else _checked(value, source, f"requested_rewrite.{field}").strip()


def counterfact_request(record: Record, source: str, default_id: str) -> EditRequest:
    """Read a record of CounterFact in its original form.

    The paraphrases become generalization probes; the neighbourhood prompts, which are about other subjects with the
    same true object, locality probes named ``neighborhood``; the generation prompts, which the files repeat, generation
    probes without repetition. ``attribute_prompts`` (subjects for which the *new* object is true) are no probes here:
    no metric of this project uses them. Derived files add ``portability`` (a one-hop question),
    ``distracting_neighborhood_prompts`` (locality, ``distracting``: the neighbours with the edited fact put before
    them) and ``unrelated_relation`` (locality, ``unrelated_relation``: another fact about the same subject).

    Args:
        record: Fields of the record.
        source: Words that locate it in an error message.
        default_id: Identifier to use if the record has no ``case_id``.

    Raises:
        RequestError: if a field is missing, empty or of another type, or the subject is not in the prompt.
    """
    rewrite = _object(record, "requested_rewrite", source)
    if not rewrite:
        raise refuse(source, "requested_rewrite", f"is missing or empty; the record has the fields: {_found(record)}.")
    subject = _text(rewrite, "subject", source, "requested_rewrite.").strip()
    prompt = _filled(_text(rewrite, "prompt", source, "requested_rewrite."), subject)
    target_new = _rewrite_target(rewrite, "target_new", source)
    if target_new is None:
        raise refuse(
            source, "requested_rewrite.target_new", f"is missing or empty; it has the fields: {_found(rewrite)}."
        )
    target_true = _rewrite_target(rewrite, "target_true", source)
    relation = None if rewrite.get("relation_id") is None else str(rewrite["relation_id"])
    probes = _probes("generalization", _texts(record, "paraphrase_prompts", source), subject, target_new)
    for field, name in (("neighborhood_prompts", "neighborhood"), ("distracting_neighborhood_prompts", DISTRACTING)):
        probes += _probes("locality", _texts(record, field, source), subject, target_true, name, relation)
    if unrelated := _object(record, "unrelated_relation", source):
        question = _text(unrelated, "question", source, "unrelated_relation.")
        answer = _text(unrelated, "object", source, "unrelated_relation.").strip()
        field = "unrelated_relation.question"
        probes.append(Probe("locality", _filled(question, subject), answer, "unrelated_relation", field=field))
    probes += _one_hop(record, subject, source)
    generation: dict[str, str] = {}
    for path, text in _texts(record, "generation_prompts", source):
        generation.setdefault(text, path)
    probes += _probes("generation", [(path, text) for text, path in generation.items()], subject)
    return _request(
        record,
        source,
        default_id,
        prompt=("requested_rewrite.prompt", prompt),
        subject=("requested_rewrite.subject", subject),
        target_new=target_new,
        target_true=target_true,
        relation=relation,
        probes=probes,
    )


def mend_request(record: Record, source: str, default_id: str) -> EditRequest:
    """Read a record of ZsRE in the form MEND published it in.

    ``src`` is the edit prompt, ``alt`` the new answer, the first of ``answers`` the true one, ``rephrase`` the
    generalization probe, ``loc`` with ``loc_ans`` a locality probe named ``natural_questions`` and ``portability``, in
    the files that have it, a one-hop question. ``pred`` (what MEND's own model answered) and ``cond`` are not used.
    ``loc`` keeps its prefix here: see `without_nq_prefix`.

    Args:
        record: Fields of the record.
        source: Words that locate it in an error message.
        default_id: Identifier to use if the record has no ``case_id``.

    Raises:
        RequestError: if a field is missing, empty or of another type, or the subject is not in ``src``.
    """
    subject = _text(record, "subject", source).strip()
    prompt = _filled(_text(record, "src", source), subject)
    target_new = _text(record, "alt", source).strip()
    probes = _probes("generalization", _texts(record, "rephrase", source), subject, target_new)
    probes += _probes(
        "locality",
        _texts(record, "loc", source),
        subject,
        _answer(record.get("loc_ans"), source, "loc_ans"),
        "natural_questions",
    )
    probes += _one_hop(record, subject, source)
    return _request(
        record,
        source,
        default_id,
        prompt=("src", prompt),
        subject=("subject", subject),
        target_new=target_new,
        target_true=_answer(record.get("answers"), source, "answers"),
        relation=None,
        probes=probes,
    )


def conceptedit_request(record: Record, source: str, default_id: str) -> EditRequest:
    """Read a record of ConceptEdit: the definition of a concept is replaced.

    ``label`` is the concept, and the subject; ``target_new_desc`` its new definition and ``target_true_desc``, where a
    file has it, the true one. ``phrase_prompt`` gives generalization probes, ``locality_prompt`` with
    ``locality_answer`` locality probes named ``neighborhood``, and ``instance_prompt`` (does an instance of the concept
    still belong to it?) instance probes. Each of these prompt fields holds one text or a list.

    Args:
        record: Fields of the record.
        source: Words that locate it in an error message.
        default_id: Identifier to use if the record has no ``case_id``.

    Raises:
        RequestError: if a field is missing, empty or of another type, or the label is not in the prompt.
    """
    subject = _text(record, "label", source).strip()
    prompt = _filled(_text(record, "prompt", source), subject)
    target_new = _text(record, "target_new_desc", source).strip()
    probes = _probes("generalization", _texts(record, "phrase_prompt", source), subject, target_new)
    probes += _paired_locality(record, "locality_prompt", "locality_answer", subject, source, "neighborhood")
    probes += _probes("instance", _texts(record, "instance_prompt", source), subject)
    return _request(
        record,
        source,
        default_id,
        prompt=("prompt", prompt),
        subject=("label", subject),
        target_new=target_new,
        target_true=_answer(record.get("target_true_desc"), source, "target_true_desc"),
        relation=None,
        probes=probes,
    )


def flat_request(record: Record, source: str, default_id: str) -> EditRequest:
    """Read a record with its fields side by side: a user's own fact, a toolkit's flat file, or KnowEdit.

    Required are ``prompt`` (with ``{}`` or containing the subject), ``subject`` and ``target_new``. Optional are
    ``target_true`` or ``ground_truth``; ``relation_id`` or ``relation``; rephrasings in ``rephrase_prompt``,
    ``rephrases`` or ``rephrase``; ``locality_prompt`` with ``locality_ground_truth``; and KnowEdit's ``locality`` and
    ``portability``, in which groups of ``{prompt, ground_truth}`` stand under their names. An answer is a text, a list
    of texts, or a list of lists of aliases. Without an answer a locality prompt is judged by the unedited model alone.

    Args:
        record: Fields of the record.
        source: Words that locate it in an error message.
        default_id: Identifier to use if the record has no ``case_id``.

    Raises:
        RequestError: if a field is missing, empty or of another type, or the subject is not in the prompt.
    """
    subject = _text(record, "subject", source).strip()
    prompt = _filled(_text(record, "prompt", source), subject)
    target_new = _text(record, "target_new", source).strip()
    answers = (_answer(record.get(field), source, field) for field in ("target_true", "ground_truth"))
    relations = (record.get(field) for field in ("relation_id", "relation"))
    relation = next((given for given in relations if not _absent(given)), None)
    probes = []
    for field in ("rephrase_prompt", "rephrases", "rephrase"):
        probes += _probes("generalization", _texts(record, field, source), subject, target_new)
    probes += _paired_locality(record, "locality_prompt", "locality_ground_truth", subject, source, "neighborhood")
    probes += _named_probes(record, "locality", subject, source)
    probes += _named_probes(record, "portability", subject, source)
    return _request(
        record,
        source,
        default_id,
        prompt=("prompt", prompt),
        subject=("subject", subject),
        target_new=target_new,
        target_true=next((answer for answer in answers if answer is not None), None),
        relation=None if relation is None else str(relation).strip(),
        probes=probes,
    )


def without_nq_prefix(request: EditRequest) -> EditRequest:
    """Take ``nq question: `` off the request's locality prompts: it was meant for the model MEND edited."""
    probes = tuple(
        replace(probe, prompt=probe.prompt[len(NQ_PREFIX) :])
        if probe.kind == "locality" and probe.prompt.startswith(NQ_PREFIX)
        else probe
        for probe in request.probes
    )
    return replace(request, probes=probes)


COUNTERFACT = Form("original CounterFact", ("requested_rewrite",), ("requested_rewrite",), counterfact_request)
MEND = Form("ZsRE as published with MEND", ("subject", "src", "alt"), ("src", "alt"), mend_request)
CONCEPTEDIT = Form(
    "ConceptEdit", ("label", "prompt", "target_new_desc"), ("label", "target_new_desc"), conceptedit_request
)
FLAT = Form("flat facts", ("prompt", "subject", "target_new"), ("prompt", "target_new"), flat_request)

# The order matters: ConceptEdit has a `prompt` too, so the flat form, which is told by it, is asked last.
ALL_FORMS = (COUNTERFACT, MEND, CONCEPTEDIT, FLAT)


def read_request(record: Record, source: str, default_id: str, forms: Sequence[Form]) -> EditRequest:
    """Read a record in whichever of the given forms it has.

    Args:
        record: Fields of the record.
        source: Words that locate it in an error message.
        default_id: Identifier to use if the record has none.
        forms: Forms to expect.

    Raises:
        RequestError: if the record has none of these forms, or a field is not as its form wants it.
    """
    form = next((form for form in ALL_FORMS if form.fits(record)), None)
    if form is not None and form in forms:
        return form.read(record, source, default_id)
    looks = f"looks like {form}" if form is not None else f"has the fields {_found(record)}"
    expected = " or ".join(str(form) for form in forms)
    raise RequestError(f"{source}: {looks}, but what is read here is {expected}.")
