from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.records import concept, counterfact, flat, mend
from lit_edit.datamodules import (
    COUNTERFACT,
    FLAT,
    conceptedit_request,
    counterfact_request,
    flat_request,
    mend_request,
    without_nq_prefix,
)
from lit_edit.datamodules.records import FLAT_FIELDS as FIELDS_READ
from lit_edit.datamodules.records import read_request

from lit_edit.requests import EditRequest, Probe, RequestError

SOURCE = "f.json, record 3"
Read = Callable[[dict[str, Any], str, str], EditRequest]


def test_counterfact() -> None:
    assert counterfact_request(counterfact(), SOURCE, "3") == EditRequest(
        case_id="12",
        prompt="Ada Lovelace was born in",
        subject="Ada Lovelace",
        target_new="Lima",
        target_true="London",
        relation="P19",
        probes=(
            Probe("generalization", "Ships sail. Ada Lovelace is native to", "Lima"),
            Probe("generalization", "Ada Lovelace comes from", "Lima"),
            Probe("locality", "John Keats was born in", "London", "neighborhood", "P19"),
            Probe("generation", "Ada Lovelace lives in"),
            Probe("generation", "Ada Lovelace's home"),
        ),
        source=SOURCE,
    )


def test_counterfact_extensions() -> None:
    record = counterfact() | {
        "portability": {"Recalled Relation": "(..)", "New Question": "Which sea is near?", "New Answer": "Pacific "},
        "distracting_neighborhood_prompts": ["Ada Lovelace was born in Lima. John Keats was born in"],
        "unrelated_relation": {"relation_id": "instance of", "object": "human", "question": "What is Ada Lovelace?"},
    }
    request = counterfact_request(record, SOURCE, "3")
    assert request.probes_of("portability") == (Probe("portability", "Which sea is near?", "Pacific", "one_hop"),)
    assert request.probes_of("locality")[1:] == (
        Probe("locality", "Ada Lovelace was born in Lima. John Keats was born in", "London", "distracting", "P19"),
        Probe("locality", "What is Ada Lovelace?", "human", "unrelated_relation"),
    )


def test_mend() -> None:
    request = mend_request(mend(), SOURCE, "3")
    assert (request.case_id, request.prompt, request.subject) == ("3", "When did MAT-49 enter service?", "MAT-49")
    assert (request.target_new, request.target_true) == ("1951", "1949")
    assert request.probes == (
        Probe("generalization", "What year was MAT-49 introduced?", "1951"),
        Probe("locality", "nq question: who sang yesterday", "The Beatles", "natural_questions"),
    )
    assert without_nq_prefix(request).probes[1].prompt == "who sang yesterday"
    assert without_nq_prefix(request).probes[0] is request.probes[0]


def test_mend_portability_and_no_answers() -> None:
    extra = {"New Question": "Who made the MAT-49?", "New Answer": "Tulle", "Recalled Relation": "(..)"}
    request = mend_request(mend() | {"portability": extra, "answers": []}, SOURCE, "3")
    assert request.target_true is None
    assert request.probes_of("portability") == (Probe("portability", "Who made the MAT-49?", "Tulle", "one_hop"),)


def test_conceptedit() -> None:
    assert conceptedit_request(concept(), SOURCE, "3") == EditRequest(
        case_id="3",
        prompt="Definition of publisher:",
        subject="publisher",
        target_new="a person who bakes bread",
        probes=(
            Probe("generalization", "What is a publisher?", "a person who bakes bread"),
            Probe("locality", "Definition of lake:", "a body of water", "neighborhood"),
            Probe("instance", "Is Penguin a publisher?"),
            Probe("instance", "Is Reclam a publisher?"),
        ),
        source=SOURCE,
    )
    several = concept() | {
        "instance_prompt": "Is Penguin a publisher?",
        "locality_prompt": ["A lake is", "A hill is"],
        "locality_answer": ["wet", "high"],
    }
    request = conceptedit_request(several, SOURCE, "3")
    assert [probe.target for probe in request.probes_of("locality")] == ["wet", "high"]
    assert len(request.probes_of("instance")) == 1


def test_flat() -> None:
    assert flat_request(flat(), SOURCE, "3") == EditRequest(
        case_id="3",
        prompt="The capital of France is",
        subject="France",
        target_new="Lyon",
        target_true="Paris",
        probes=(
            Probe("generalization", "The seat of France's government is", "Lyon"),
            Probe("locality", "The capital of Spain is", "Madrid", "neighborhood"),
        ),
        source=SOURCE,
    )


class Noting(dict[str, Any]):
    """A record that knows which of its fields were read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


def test_the_fields_that_are_named_are_those_that_are_read() -> None:
    record = Noting({"prompt": "{} is", "subject": "Rome", "target_new": "x"})
    flat_request(record, SOURCE, "3")
    assert record.read == set(FIELDS_READ)


def test_the_relation_has_two_names_and_may_be_a_number() -> None:
    assert flat_request(flat() | {"relation": " capital "}, SOURCE, "3").relation == "capital"
    assert flat_request(flat() | {"relation": "capital", "relation_id": 36}, SOURCE, "3").relation == "36"
    assert flat_request(flat() | {"relation": "capital", "relation_id": ""}, SOURCE, "3").relation == "capital"
    assert flat_request(flat() | {"relation": None}, SOURCE, "3").relation is None


def test_every_probe_knows_the_field_it_stands_in() -> None:
    several = flat() | {
        "rephrases": ["{} a", "{} b"],
        "locality_prompt": ["c", "d"],
        "locality_ground_truth": ["C", "D"],
        "portability": {"hop": {"prompt": "e", "ground_truth": "E"}},
    }
    expected = {
        flat_request: (
            several,
            "rephrase_prompt, rephrases[0], rephrases[1], locality_prompt[0], locality_prompt[1], "
            "portability.hop[0].prompt",
        ),
        counterfact_request: (
            counterfact() | {"unrelated_relation": {"question": "What?", "object": "x"}},
            "paraphrase_prompts[0], paraphrase_prompts[1], neighborhood_prompts[0], unrelated_relation.question, "
            "generation_prompts[0], generation_prompts[1]",
        ),
        mend_request: (
            mend() | {"portability": {"New Question": "Who?", "New Answer": "x"}},
            "rephrase, loc, portability.New Question",
        ),
        conceptedit_request: (concept(), "phrase_prompt, locality_prompt, instance_prompt[0], instance_prompt[1]"),
    }
    for read, (record, fields) in expected.items():
        assert ", ".join(probe.field for probe in read(record, SOURCE, "3").probes) == fields


def test_flat_with_the_least() -> None:
    request = flat_request({"prompt": " In France,\n", "subject": "France ", "target_new": " x"}, SOURCE, "3")
    assert (request.prompt, request.subject, request.target_new) == (" In France,", "France", "x")
    assert (request.target_true, request.probes) == (None, ())


@pytest.mark.parametrize("truth", ["Paris", ["Paris", "paris"], [["Paris", "paris"], ["Lutetia"]], [[], ["Paris"]]])
def test_ground_truth_as_text_list_or_aliases(truth: object) -> None:
    assert flat_request(flat() | {"ground_truth": truth}, SOURCE, "3").target_true == "Paris"


def test_knowedit() -> None:
    record = flat() | {
        "locality_prompt": None,
        "locality": {
            "Relation_Specificity": [
                {"prompt": "The river of France is", "ground_truth": [["Seine", "la Seine"]]},
                {"prompt": "The tower of France is"},
            ],
            "Forgetfulness": {"prompt": "Towns of France are Nice and", "ground_truth": "Brest"},
            "Empty": None,
        },
        "portability": {"Reasoning": [{"prompt": "France's mayor lives in", "ground_truth": ["Lyon"]}]},
    }
    del record["locality_ground_truth"]
    request = flat_request(record, SOURCE, "3")
    assert request.probes[1:] == (
        Probe("locality", "The river of France is", "Seine", "Relation_Specificity"),
        Probe("locality", "The tower of France is", None, "Relation_Specificity"),
        Probe("locality", "Towns of France are Nice and", "Brest", "Forgetfulness"),
        Probe("portability", "France's mayor lives in", "Lyon", "Reasoning"),
    )


MISSING = object()


def changed(record: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    *way, last = path.split(".")
    inner = record
    for step in way:
        inner = inner[step]
    if value is MISSING:
        del inner[last]
    else:
        inner[last] = value
    return record


REWRITE_FIELDS = "prompt, relation_id, target_new, target_true"
FLAT_FIELDS = "prompt, target_new, ground_truth, rephrase_prompt, locality_prompt, locality_ground_truth, remark"


@pytest.mark.parametrize(
    ("read", "record", "path", "value", "message"),
    [
        (counterfact_request, counterfact, "requested_rewrite", 5, "'requested_rewrite': must be an object with named"),
        (counterfact_request, counterfact, "requested_rewrite", {}, "'requested_rewrite': is missing or empty; the"),
        (
            counterfact_request,
            counterfact,
            "requested_rewrite.subject",
            MISSING,
            f"'requested_rewrite.subject': is missing; the record has the fields: {REWRITE_FIELDS}.",
        ),
        (
            counterfact_request,
            counterfact,
            "requested_rewrite.target_new",
            MISSING,
            "'requested_rewrite.target_new': is missing or empty; it has the fields: prompt, subject, relation_id, ",
        ),
        (
            counterfact_request,
            counterfact,
            "requested_rewrite.target_new.str",
            " ",
            "'requested_rewrite.target_new.str': is empty.",
        ),
        (
            counterfact_request,
            counterfact,
            "requested_rewrite.prompt",
            "He was born in",
            "'requested_rewrite.subject': 'Ada Lovelace' does not occur in 'requested_rewrite.prompt', 'He was bor",
        ),
        (
            counterfact_request,
            counterfact,
            "paraphrase_prompts",
            ["x", ""],
            "'paraphrase_prompts[1]': is empty.",
        ),
        (
            counterfact_request,
            counterfact,
            "neighborhood_prompts",
            {"a": 1},
            "'neighborhood_prompts': must be text or a list of texts, but is {'a': 1}.",
        ),
        (
            counterfact_request,
            counterfact,
            "portability",
            {"New Question": "Q?"},
            "'portability.New Answer': is missing; the record has the fields: New Question.",
        ),
        (mend_request, mend, "alt", "", "'alt': is empty."),
        (mend_request, mend, "src", MISSING, "'src': is missing; the record has the fields: subject, pred, rephrase,"),
        (mend_request, mend, "subject", "mat-49", "'subject': 'mat-49' does not occur in 'src', 'When did MAT-49"),
        (mend_request, mend, "subject", "mat-49", "?'; it does in another spelling of upper and lower case."),
        (mend_request, mend, "answers", 5, "'answers': must be text, a list of texts or a list of such lists, but is"),
        (conceptedit_request, concept, "label", "lake", "'label': 'lake' does not occur in 'prompt', 'Definition of p"),
        (conceptedit_request, concept, "target_new_desc", None, "'target_new_desc': is empty."),
        (
            conceptedit_request,
            concept,
            "locality_answer",
            ["a", "b"],
            "'locality_answer': has 2 texts for the 1 of 'locality_prompt'.",
        ),
        (flat_request, flat, "subject", MISSING, f"'subject': is missing; the record has the fields: {FLAT_FIELDS}."),
        (flat_request, flat, "target_new", 1998, "'target_new': must be text, but is 1998."),
        (flat_request, flat, "prompt", "\n", "'prompt': is empty."),
        (flat_request, flat, "locality", {"a": "b"}, "'locality.a': must be a list of objects, but is 'b'."),
        (flat_request, flat, "locality", {"a": ["b"]}, "'locality.a[0]': must be an object with a prompt, but is 'b'."),
        (
            flat_request,
            flat,
            "locality",
            {"a": [{"prompt": "x"}, {"q": "y"}]},
            "'locality.a[1].prompt': is missing; the record has the fields: q.",
        ),
        (
            flat_request,
            flat,
            "portability",
            {"a": [{"prompt": "x", "ground_truth": []}]},
            "'portability.a[0].ground_truth': is missing or empty.",
        ),
    ],
)
def test_a_bad_field_is_named(
    read: Read, record: Callable[[], dict[str, Any]], path: str, value: object, message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        read(changed(record(), path, value), SOURCE, "3")
    assert str(caught.value).startswith(f"{SOURCE}, field '")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_form_is_named() -> None:
    with pytest.raises(RequestError) as caught:
        read_request(mend(), SOURCE, "3", (COUNTERFACT, FLAT))
    assert str(caught.value) == (
        f"{SOURCE}: looks like ZsRE as published with MEND (subject, src, alt), but what is read here is original "
        "CounterFact (requested_rewrite) or flat facts (prompt, subject, target_new)."
    )
    with pytest.raises(RequestError) as caught:
        read_request({"question": "?", "answer": "!"}, SOURCE, "3", (FLAT,))
    assert str(caught.value) == (
        f"{SOURCE}: has the fields question, answer, but what is read here is flat facts (prompt, subject, target_new)."
    )


def test_each_form_is_recognised() -> None:
    forms = (COUNTERFACT, FLAT)
    assert read_request(counterfact(), SOURCE, "3", forms).case_id == "12"
    assert read_request(flat(), SOURCE, "3", forms).case_id == "3"
    with pytest.raises(RequestError, match="looks like ConceptEdit"):
        read_request(concept(), SOURCE, "3", forms)
