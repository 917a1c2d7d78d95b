"""The card's figures: recall against a plain computation, causal tracing where its outcome is known, and its text."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from torch.nn.functional import cross_entropy

from lit_edit.evaluation.evaluate import Reference
from lit_edit.evaluation.tracing import Trace, draw
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest, Probe
from lit_edit.world.recipe import card

FACTS = [("Paris", "The city of Paris is in"), ("Oslo", "People in Oslo pay with"), ("Rome", "Rome is the home of")]


@pytest.fixture
def tiny() -> tuple[Any, Any]:
    return tiny_model("llama")


def first_token(model: Any, tokenizer: Any, prompt: str) -> str:
    """What the model says next, as text that is one token again; the model is random and may say anything."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    order = model(input_ids=ids).logits[0, -1].argsort(descending=True).tolist()
    words = (tokenizer.decode([token]) for token in order)
    return next(w[1:] for w in words if w.startswith(" ") and w[1:].isalpha() and len(ids_of(tokenizer, w)) == 1)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture
def requests(tiny: tuple[Any, Any]) -> list[EditRequest]:
    probes = (
        Probe("generalization", "In Bergen one says"),
        Probe("generalization", "In Narvik one says"),
        Probe("locality", "Rome is the home of", "works"),
    )
    return [
        EditRequest(str(i), prompt, subject, "Oslo", target_true=first_token(*tiny, prompt), probes=probes)
        for i, (subject, prompt) in enumerate(FACTS)
    ]


@torch.no_grad()
def test_recall_is_the_share_of_greedy_answers(tiny: tuple[Any, Any], requests: list[EditRequest]) -> None:
    model, tokenizer = tiny

    def greedy(prompt: str, answer: str) -> bool:
        ids, wanted = tokenizer(prompt)["input_ids"], ids_of(tokenizer, f" {answer}")
        predicted = model(input_ids=torch.tensor([ids + wanted])).logits[0, len(ids) - 1 : -1].argmax(-1).tolist()
        return bool(predicted == wanted)

    found = card.recall(Workspace.of(model, tokenizer), requests)
    asked = {(r.prompt, r.target_true or "") for r in requests}
    assert found["edit prompts"] == pytest.approx(sum(greedy(*pair) for pair in asked) / len(asked))
    last = {("In Narvik one says", r.target_true or "") for r in requests}
    assert found["last paraphrases"] == pytest.approx(sum(greedy(*pair) for pair in last) / len(last))
    assert found["locality prompts"] == float(greedy("Rome is the home of", "works"))


def test_recall_needs_true_objects(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="needs the true object"):
        card.recall(Workspace.of(*tiny), [EditRequest("1", "Paris is in", "Paris", "Oslo")])


@torch.no_grad()
def test_perplexity_is_of_all_tokens_but_the_first(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    texts = ["The capital of France is Paris.", "Maria was born in Oslo and works in Rome.", "Oslo."]
    losses = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        losses.append(cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    expected = math.exp(float(torch.cat(losses).mean()))
    assert card.perplexity(Workspace.of(model, tokenizer), texts) == pytest.approx(expected, rel=1e-4)


def test_single_edits_leave_the_model_as_it_was(tiny: tuple[Any, Any], requests: list[EditRequest]) -> None:
    model, tokenizer = copy.deepcopy(tiny)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for method in card.METHODS:
        found = card.single_edits(model, tokenizer, requests, [1, 2], method, Reference())
        assert set(found) == {"p(v*)", "reliability", "generalization", "locality"}
        assert all(0 <= value <= 1 for value in found.values())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_layer_sets_are_each_layer_or_all_neighbours() -> None:
    rome, mose = card.METHODS
    assert card.layer_sets(rome, 4) == [[0], [1], [2], [3]]
    assert card.layer_sets(mose, 4) == [[0, 1, 2], [1, 2, 3]]


def test_single_edits_are_of_records_that_no_table_has() -> None:
    found = card.for_choosing()
    records = json.loads(card.embedded_path("data", "counterfact.json").read_text(encoding="utf-8"))
    assert [r.subject for r in found] == [r["requested_rewrite"]["subject"] for r in records if r["split"] == "choose"]
    assert len(found) >= card.SINGLE_EDITS


def test_the_shipped_card_is_made_of_the_shipped_figures() -> None:
    folder = card.embedded_path("model")
    figures = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert (folder / "README.md").read_text(encoding="utf-8") == card.card_text(figures)
    assert figures["n_single"] >= 50
    wanted = sum(len(card.layer_sets(method, figures["layers"])) for method in card.METHODS)
    assert len(figures["single_edits"]) == wanted


def test_the_shipped_figure_is_drawn_from_the_shipped_tracing(tmp_path: Path) -> None:
    folder = card.embedded_path("model")
    trace = Trace(**json.loads((folder / "scores.json").read_text(encoding="utf-8"))["tracing"])
    assert trace.facts >= 100
    assert 2 <= trace.strongest() <= 5  # facts lie in the middle layers
    draw(trace, tmp_path / "tracing.png")
    assert (tmp_path / "tracing.png").read_bytes() == (folder / "tracing.png").read_bytes()
