"""Scope: hand-made overlaps of edits and probes."""

from __future__ import annotations

from lit_edit.evaluation.scope import EditedFacts
from lit_edit.requests import DISTRACTING, EditRequest, Probe


def fact(number: int, prompt: str, subject: str, target: str, relation: str | None = None, *same: str) -> EditRequest:
    probes = tuple(Probe("generalization", prompt) for prompt in same)
    return EditRequest(str(number), prompt, subject, target, relation=relation, probes=probes)


BORN = fact(1, "Ada O'Neil was born in", "Ada O'Neil", "Rome", "P19", "The birthplace of Ada O'Neil is")
AGAIN = fact(2, "Ada O'Neil comes from", "Ada O'Neil", "Oslo", "P19")
WORKS = fact(3, "Ben works for", "Ben", "Acme", "P108")
PLAIN = fact(4, "The capital of Peru is", "Peru", "Cusco")
FACTS = EditedFacts([BORN, AGAIN, WORKS, PLAIN])


def test_the_latest_edit_of_a_fact_counts() -> None:
    assert FACTS.latest(BORN) is AGAIN  # same subject and relation
    assert FACTS.latest(AGAIN) is AGAIN
    assert FACTS.latest(WORKS) is WORKS
    same_prompt = fact(5, "The  CAPITAL of Peru is", "Peru", "Lima")
    assert EditedFacts([PLAIN, same_prompt]).latest(PLAIN) is same_prompt
    assert FACTS.latest(fact(6, "Cuba lies in", "Cuba", "Asia", "P30")).case_id == "6"  # nobody edited it


def test_a_probe_that_asks_for_an_edit_is_about_consistency() -> None:
    for prompt, relation, edit in (
        ("ada o'neil  was born in", None, BORN),  # the edit prompt itself
        ("The birthplace of Ada O'Neil is", None, BORN),  # a rephrasing of one
        ("The home town of Ada O'Neil is", "P19", AGAIN),  # the same relation in other words: the latest
        ("The capital of Peru is", None, PLAIN),
    ):
        assert FACTS.scope(Probe("locality", prompt, relation=relation)) == ("consistency", edit), prompt


def test_a_probe_about_another_fact_of_an_edited_subject_counts_apart() -> None:
    for prompt, relation in (
        ("Ada O'Neil speaks", None),
        ("Ada O'Neil speaks", "P103"),
        ("In Peru people pay with the", "P38"),
        ("Where does ben live?", None),
        ("Where does Ben live?", None),
        ("Is Peru large?", None),
    ):
        assert FACTS.scope(Probe("locality", prompt, relation=relation)) == ("same_subject", None), prompt


def test_everything_else_is_locality() -> None:
    for prompt, relation in (
        ("Benjamin works for", "P108"),  # another word
        ("Ada Neil was born in", "P19"),
        ("Ben Abel works for", "P108"),  # longer names
        ("Jo Ben works for", "P108"),
        ("The friends of Carl Ben work for", "P108"),
        ("The capital of Chile is", None),
        ("", None),
    ):
        if prompt:
            assert FACTS.scope(Probe("locality", prompt, relation=relation)) == ("locality", None), prompt
    assert EditedFacts([]).scope(Probe("locality", "Ada O'Neil was born in")) == ("locality", None)


def test_a_distracting_probe_asks_what_comes_last() -> None:
    text = "Ada O'Neil was born in Rome. {} was born in"
    for who, scope in (("Carl", "locality"), ("Ben", "same_subject")):
        assert FACTS.scope(Probe("locality", text.format(who), name=DISTRACTING, relation="P19"))[0] == scope
