"""What is said of a file of facts before anything is edited."""

from __future__ import annotations

import io

import pytest
import torch
from helpers.runs import taught
from rich.console import Console

from lit_edit import EditRequest
from lit_edit.commands.review import review, review_line, review_table
from lit_edit.model.prompts import Prompter
from lit_edit.requests import Probe, RequestError


@pytest.fixture(scope="module")
def model(tiny_folder):
    return taught(tiny_folder("qwen2"))


FACTS = [
    EditRequest("a", "The capital of France is", "France", "Lyon."),
    EditRequest("b", "The capital of Peru is", "Peru", "Oslo."),
    EditRequest("c", "the capital  of France is", "France", "Rome."),
    EditRequest("d", "The capital of Peru is", "Peru", "oslo."),
    EditRequest("e", "Maria was born in", "Maria", "Rome.", relation="P19"),
    EditRequest("f", "The birthplace of Maria is", "Maria", "Paris.", relation="p19 "),
    EditRequest("g", "Maria works in", "Maria", "Paris.", relation="P937"),
]


def test_every_request_is_judged_before_the_first_edit(model) -> None:
    net, tokenizer = model
    before = {n: t.clone() for n, t in net.state_dict().items()}
    found = review(FACTS, net, Prompter(tokenizer, 128))
    assert [r.request.case_id for r in found] == list("abcdefg")
    assert [r.known for r in found] == [True] + [False] * 6  # the model was taught the first
    assert [r.repeats for r in found] == [None, None, None, "b", None, None, None]
    assert [r.contradicts for r in found] == [(), (), ("a",), (), (), ("e",), ()]
    assert found[0].probability > 0.5 > found[1].probability
    assert all(r.target_tokens >= 1 for r in found)
    assert all(r.request.subject.endswith(r.edited_token.strip()) for r in found)
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())


def asking(case_id: str, prompt: str, target: str, *probes: Probe) -> EditRequest:
    return EditRequest(case_id, f"{prompt} of Peru is", "Peru", target, probes=probes, source=f"f.csv, line {case_id}")


def test_a_rephrasing_asks_the_same(model) -> None:
    net, tokenizer = model
    facts = [
        asking("1", "The capital", "Oslo", Probe("generalization", "The seat of Peru is")),
        asking("2", "The seat", "Rome"),  # the first one's rephrasing
        asking("3", "The river", "Nile", Probe("generalization", "the  Capital of Peru is")),  # and its prompt
        asking("4", "The lake", "oslo", Probe("generalization", "The seat of Peru is")),  # the same rephrasing
    ]
    found = review(facts, net, Prompter(tokenizer, 128))
    assert [r.contradicts for r in found] == [(), ("1",), ("1",), ("2",)]
    assert [r.repeats for r in found] == [None, None, None, "1"]


def test_a_prompt_that_another_fact_wants_left_alone_is_flagged(model) -> None:
    net, tokenizer = model
    near = [Probe("locality", f"The {what} of Peru is", answer) for what, answer in
            (("capital", "Lima"), ("river", "nile"), ("lake", None))]  # fmt: skip
    facts = [
        asking("1", "The capital", "Oslo"),
        asking("2", "The mayor", "Ana", *near, Probe("locality", "The mayor of Peru is", "Bob")),
        asking("3", "The river", "Nile"),  # the recorded answer
        asking("4", "The lake", "Wet"),  # the unedited model's answer is to stay
        EditRequest("5", "The capital of France is", "France", "Lyon."),
        asking("6", "The sea", "Salt", Probe("locality", "The capital of France is")),  # it is known: nothing to change
    ]
    found = review(facts, net, Prompter(tokenizer, 128))
    assert found[4].known
    assert [r.disturbs for r in found] == [("2",), (), (), ("2",), (), ()]
    line = review_line(found, most=1)
    assert line.startswith("6 facts to write (0 rephrasings, 5 locality probes): 1 already known, 0 given twice, 0 con")
    assert line.endswith(
        ", 2 against a locality probe of another ('The capital of Peru is' of f.csv, line 1 is to stay as it is for "
        "f.csv, line 2; and 1 more, see --dry_run)."
    )
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(review_table(found))
    text = " ".join(console.export_text().split())
    assert "6 facts to write (0 rephrasings, 5 locality probes)" in text
    assert "2 against a locality probe of another" in text
    assert "disturbs 2" in text


def test_the_probability_is_that_of_the_whole_target(model) -> None:
    net, tokenizer = model
    (found,) = review(FACTS[:1], net, Prompter(tokenizer, 128))
    ids = tokenizer("The capital of France is Lyon.")["input_ids"]
    start = len(tokenizer("The capital of France is")["input_ids"])
    with torch.no_grad():
        log_p = net(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = float(sum(log_p[t - 1, ids[t]] for t in range(start, len(ids))).exp())
    assert found.probability == pytest.approx(expected, rel=1e-4)
    assert found.target_tokens == len(ids) - start


def test_the_table_shows_what_deserves_a_look_first_and_counts_everything(model) -> None:
    net, tokenizer = model
    found = review(FACTS, net, Prompter(tokenizer, 128))
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(review_table(found, most=4))
    text = console.export_text()
    assert "7 facts to write" in text
    assert "1 already known, 1 given twice, 2 contradicting an earlier one" in text
    assert "shows 4 of 7" in text
    for note in ("known already", "same as b", "contradicts a", "contradicts e"):
        assert note in text


def test_a_record_that_cannot_be_edited_is_named_and_nothing_is_nothing(model) -> None:
    net, tokenizer = model
    with pytest.raises(RequestError, match=r"facts\.csv, record 2"):
        review(
            [EditRequest("x", "Oslo " * 200, "Oslo", "Rome", source="facts.csv, record 2")],
            net,
            Prompter(tokenizer, 64),
        )
    assert review([], net, Prompter(tokenizer, 64)) == []
