"""Judging edits: against a plain loop, by hand-made answers, and a perfect editor's."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import REPOSITORY, tiny_tokenizer
from helpers.runs import taught
from lit_edit.datamodules import ConceptEditDataModule, CounterFactDataModule, ZsREDataModule
from torch import Tensor, nn

from lit_edit.evaluation.evaluate import (
    WAYS,
    Outcome,
    Question,
    Reference,
    evaluate,
    figures,
    interval,
)
from lit_edit.model.prompts import Prompter
from lit_edit.requests import EditRequest, Probe, RequestError

DATA = REPOSITORY / "lit_edit" / "world" / "data"
Folder = Callable[[str], Path]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model_and_tokenizer(request: pytest.FixtureRequest, tiny_folder: Folder) -> tuple[Any, Any]:
    return taught(tiny_folder(request.param))


REQUESTS = [
    EditRequest(
        "0", "The capital of France is", "France", "Lyon.", target_true="Rome",
        probes=(
            Probe("generalization", "The capital of Peru is"),  # answered by another
            Probe("generalization", "The capital of France is"),
            Probe("locality", "Maria was born in", target="Oslo now"),
            Probe("locality", "The river of Peru", target="runs"),
            Probe("portability", "The river of Peru runs slowly to the", target="sea."),
            Probe("portability", "The river of Peru runs slowly to the"),  # no answer recorded: not scored
            Probe("generation", "France is"),
            Probe("instance", "Question: is snow cold? Answer:"),
        ),
    ),
    EditRequest("1", "The capital of Chile is", "Chile", "Oslo.", probes=(Probe("generalization", "Chile"),)),
]  # fmt: skip


@torch.no_grad()
def most_likely(model: Any, tokenizer: Any, prompt: str, n: int) -> list[int]:
    ids = tokenizer(prompt)["input_ids"]
    out: list[int] = []
    while len(out) < n:
        token = int(model(input_ids=torch.tensor([ids + out]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        out.append(token)
    return out


def test_it_equals_a_plain_loop(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    prompter, reference = Prompter(tokenizer, 128), Reference()
    reference.collect(model, prompter, REQUESTS)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for p in changed.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    outcomes = evaluate(changed, prompter, REQUESTS, reference)
    asked = [
        (0, "reliability", "The capital of France is", " Lyon."),
        (0, "generalization", "The capital of Peru is", " Lyon."),
        (0, "generalization", "The capital of France is", " Lyon."),
        (0, "locality", "Maria was born in", None),
        (0, "locality", "The river of Peru", None),
        (0, "portability", "The river of Peru runs slowly to the", " sea."),
        (1, "reliability", "The capital of Chile is", " Oslo."),
        (1, "generalization", "Chile", " Oslo."),
    ]
    found = [(i, q.kind, q.prompt, q) for i, o in enumerate(outcomes) for q in o.questions if q.kind != "instance"]
    assert [row[:3] for row in found] == [row[:3] for row in asked]
    for (_, _, prompt, target), (*_, question) in zip(asked, found, strict=True):
        before = tokenizer(prompt)["input_ids"]
        if target is None:
            length = len(
                tokenizer(" Oslo now" if "Maria" in prompt else " runs", add_special_tokens=False)["input_ids"]
            )
            wanted = most_likely(model, tokenizer, prompt, length)
        else:
            wanted = tokenizer(prompt + target)["input_ids"][len(before) :]
        with torch.no_grad():
            log_p = changed(input_ids=torch.tensor([before + wanted])).logits[0].log_softmax(-1)[len(before) - 1 : -1]
        right = [int(row.argmax()) == token for row, token in zip(log_p, wanted, strict=True)]
        chosen = [float(row[token]) for row, token in zip(log_p, wanted, strict=True)]
        places = [int((row > row[token]).sum()) + 1 for row, token in zip(log_p, wanted, strict=True)]
        assert question.exact == all(right)
        assert question.token_accuracy == pytest.approx(sum(right) / len(right))
        assert question.probability == pytest.approx(np.exp(sum(chosen)), rel=1e-3)
        assert question.rank == max(places)
        assert question.expected == tokenizer.decode(wanted, skip_special_tokens=True).strip()
        said = tokenizer.decode(most_likely(changed, tokenizer, prompt, len(wanted) + 3), skip_special_tokens=True)
        assert question.answer == (question.expected if question.exact else said.strip())
    # The only question with another answer on record: "Rome" against "Lyon.", by probability per token.
    own = outcomes[0].own
    rows = [prompter.row("The capital of France is", answer) for answer in ("Lyon.", "Rome")]
    from lit_edit.evaluation.scores import score_targets

    means = score_targets(changed, prompter, rows).mean_log_prob
    assert own.preferred == bool(means[0] > means[1])
    assert outcomes[1].own.preferred is None


def test_the_unedited_model_keeps_every_answer(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    prompter, reference = Prompter(tokenizer, 128), Reference()
    # The text ends at once behind the second: that is an answer, too.
    probes = (Probe("locality", "Maria was born in"), Probe("locality", "The capital of France is Lyon.", target="It"))
    request = EditRequest("0", "In Rome", "Rome", "no", probes=(*probes, Probe("instance", "Is Rome a town?")))
    assert reference.collect(model, prompter, [request]) == 4
    assert reference.collect(model, prompter, [request]) == 0
    found = figures(evaluate(model, prompter, [request], reference, edited=None))
    assert found["locality"] == 1.0
    assert found["count/locality"] == 2
    assert found["instance_unclear"] == 1.0  # it says neither yes nor no
    assert "instance_change" not in found


def test_a_probe_that_is_too_long_names_its_record(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    probe = Probe("locality", "so " * 200, target="so")
    request = EditRequest("0", "Maria is", "Maria", "in", probes=(probe,), source="f.json, record 4")
    with pytest.raises(RequestError, match="record 4"):
        Reference().collect(model, Prompter(tokenizer, 128), [request])


# Figures


def question(kind: str, exact: bool, **changes: Any) -> Question:
    given: dict[str, Any] = {"token_accuracy": float(exact), "probability": 0.5, "rank": 1 if exact else 7}
    given |= {"expected": "Rome", "answer": "Rome" if exact else "Oslo", **changes}
    return Question(kind, "?", exact=exact, **given)


def outcome(*questions: Question) -> Outcome:
    return Outcome(REQUESTS[1], list(questions))


def test_probes_are_averaged_within_an_edit_then_over_edits() -> None:
    found = figures(
        [
            outcome(
                question("reliability", True),
                *(question("locality", hit) for hit in (True, True, False, False)),
                question("same_subject", False),
                question("consistency", True),
            ),
            outcome(question("reliability", False), question("locality", True)),
        ],
        ["exact_match"],
    )
    assert found["reliability"] == 0.5
    assert found["locality"] == pytest.approx(0.75)  # not 3 of 5
    assert found["count/locality"] == 5
    assert (found["locality/same_subject"], found["consistency"]) == (0.0, 1.0)
    assert found["interval/reliability/low"] == 0.0
    assert found["interval/reliability/high"] == 1.0


def test_every_way_of_judging_by_hand() -> None:
    cases = [
        # exact, token accuracy, preferred, answer -> by exact match, tokens, probability, generation
        ((True, 1.0, True, "Rome"), (1.0, 1.0, 1.0, 1.0)),
        ((False, 0.5, True, "Rome, of course"), (0.0, 0.5, 1.0, 1.0)),
        ((False, 0.5, False, "Romania"), (0.0, 0.5, 0.0, 0.0)),
        ((False, 0.0, None, None), (0.0, 0.0, None, None)),
    ]
    for (exact, tokens, preferred, answer), wanted in cases:
        asked = question("reliability", exact, token_accuracy=tokens, preferred=preferred, answer=answer)
        if answer == "Romania":  # begins with other words
            asked = question("reliability", exact, token_accuracy=tokens, preferred=preferred, answer="In Rome")
        assert tuple(asked.score(way) for way in WAYS) == wanted
    found = figures([outcome(question("reliability", False, preferred=True))], ["probability", "exact_match"])
    assert (found["reliability"], found["exact_match/reliability"]) == (1.0, 0.0)


def test_instances_that_change_are_counted_among_the_clear_answers() -> None:
    asked = [("yes", "No."), ("Yes, it is", "yes"), ("no", "perhaps"), ("", "no")]
    questions = [question("instance", False, expected=before, answer=now) for before, now in asked]
    found = figures([outcome(question("reliability", True), *questions)])
    assert found["instance_change"] == 0.5
    assert found["instance_unclear"] == 0.5


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    values = np.array([0.0, 1.0, 1.0, 0.5, 1.0, 0.0, 1.0, 1.0])
    low, high = interval(values)
    rng = np.random.default_rng(7)
    means = [rng.choice(values, len(values)).mean() for _ in range(20_000)]
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.03)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.03)
    assert interval(values) == (low, high)
    assert interval(np.ones(5)) == (1.0, 1.0)


# A perfect editor


class Oracle(nn.Module):
    """A language model that looks every answer up, and ends the text behind it."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        super().__init__()
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.next: dict[tuple[int, ...], int] = {}
        self.head = nn.Identity()
        self.anchor = nn.Parameter(torch.zeros(1), requires_grad=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def learn(self, prompt: str, answer: str) -> None:
        start, whole = self.tokenizer(prompt)["input_ids"], self.tokenizer(f"{prompt} {answer}")["input_ids"]
        assert whole[: len(start)] == start
        for end in range(len(start), len(whole)):
            self.next[tuple(whole[:end])] = whole[end]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Tensor | None = None, **_: Any
    ) -> Any:
        ids = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], dim=1)
        first = ids.shape[1] - input_ids.shape[1]
        state = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, (tokens, mask) in enumerate(zip(ids.tolist(), attention_mask.tolist(), strict=True)):
            for column in range(input_ids.shape[1]):
                seen = tuple(t for t, m in zip(tokens[: first + column + 1], mask, strict=False) if m)
                state[row, column, self.next.get(seen, self.tokenizer.eos_token_id)] = 1.0
        return SimpleNamespace(logits=self.head(state), past_key_values=ids)


def names(text: str, subject: str) -> bool:
    """Whether a text names a subject that is no part of a longer name."""
    for found in re.finditer(rf"\b{re.escape(subject)}", text):
        before, after = text[: found.start()], text[found.end() :]
        if not re.match(r"\w| [A-Z]", after) and not re.search(r". [A-Z]\w* $", before):
            return True
    return False


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.glob("*.json") if path.name != "tasks.json"))
def test_a_perfect_editor_scores_one_at_a_thousand_edits_on_every_shipped_file(name: str) -> None:
    kind: Any = {"final": ConceptEditDataModule, "zsre": ZsREDataModule}.get(re.split(r"[_.]", name)[0])
    data = (kind or CounterFactDataModule)(path=str(DATA / name), n_edits=None)
    data.setup("fit")
    requests = data.requests[:1000]
    tokenizer = tiny_tokenizer(bos=True)
    prompter, model, reference = Prompter(tokenizer, 4096), Oracle(tokenizer, len(tokenizer)), Reference()
    for request in requests:
        model.learn(request.prompt, request.target_true or "nothing")
        for probe in request.probes:
            if probe.kind in ("locality", "generalization"):
                truth = probe.target if probe.kind == "locality" else request.target_true
                model.learn(probe.prompt, truth or "nothing")
    reference.collect(model, prompter, requests)
    for request in requests:  # in order: a later edit of the same fact wins
        model.learn(request.prompt, request.target_new)
        for probe in request.probes:
            if probe.kind == "generalization" or (probe.kind == "portability" and probe.target):
                answer = request.target_new if probe.kind == "generalization" else probe.target
                model.learn(probe.prompt, answer or "nothing")
        # What asks for the same in the words of somebody's probe follows, by brute force.
        for other in requests:
            for probe in other.probes_of("locality"):
                asks = probe.relation is not None and probe.relation == request.relation
                if asks and names(probe.prompt, request.subject):
                    model.learn(probe.prompt, request.target_new)
    found = figures(evaluate(model, prompter, requests, reference, ways=["exact_match"]), ["exact_match"])
    scored = {k: v for k, v in found.items() if not k.startswith(("count/", "interval/", "instance"))}
    assert {"reliability", "generalization"} < set(scored)
    assert scored == dict.fromkeys(scored, 1.0), json.dumps(scored)
