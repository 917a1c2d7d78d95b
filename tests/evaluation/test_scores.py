"""Scores and greedy answers against plain loops: a text at a time, a token at a time, no padding, no cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import SENTENCES, taught

from lit_edit.evaluation import scores
from lit_edit.evaluation.scores import LocalityReference, evaluate, greedy, score_targets
from lit_edit.model.prompts import Prompter
from lit_edit.requests import EditRequest, Probe, RequestError

Taught = tuple[Any, Any]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model_and_tokenizer(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> Taught:
    """A tiny model that knows `SENTENCES` by heart; GPT-2's positions are absolute, Llama's are relative."""
    return taught(tiny_folder(request.param))


@pytest.fixture
def model(model_and_tokenizer: Taught) -> Any:
    return model_and_tokenizer[0]


@pytest.fixture
def prompter(model_and_tokenizer: Taught) -> Prompter:
    return Prompter(model_and_tokenizer[1], 128)


@torch.no_grad()
def stepwise(model: Any, tokenizer: Any, prompt: str, n: int) -> list[int]:
    """The most likely token, and again, until the end of the text."""
    ids = tokenizer(prompt)["input_ids"]
    out: list[int] = []
    while len(out) < n:
        token = int(model(input_ids=torch.tensor([ids + out]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        out.append(token)
    return out


def tail(tokenizer: Any, prompt: str, target: str) -> list[int]:
    """The target's tokens; these tokenizers never join what a space separates."""
    before, whole = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {target}")["input_ids"]
    assert whole[: len(before)] == before
    return whole[len(before) :]


PROMPTS = [
    "The capital of France is",
    "The capital",
    "Maria was born in",
    "The capital of France is Lyon.",  # the text ends here
    "The river of Peru runs slowly to the",
    "Nobody taught it this, whatever",
]


@pytest.mark.parametrize("tokens_per_batch", [4096, 60, 1])
def test_greedy_is_the_most_likely_token_step_by_step(
    model: Any, prompter: Prompter, monkeypatch: pytest.MonkeyPatch, tokens_per_batch: int
) -> None:
    monkeypatch.setattr(evaluation, "TOKENS_PER_BATCH", tokens_per_batch)
    limits = [3, 40, 40, 5, 40, 0]
    found = greedy(model, prompter, PROMPTS, limits)
    expected = [stepwise(model, prompter.tokenizer, p, n) for p, n in zip(PROMPTS, limits, strict=True)]
    assert found == expected
    lengths = [len(ids) for ids in found]
    assert lengths[0] == 3  # cut by the limit
    assert lengths[3] == 0  # ended at once
    assert 1 < lengths[2] < 40  # ended by itself, in a batch that went on
    assert prompter.tokenizer.decode(found[2]) == " Oslo."


def test_greedy_does_not_depend_on_the_models_generation_settings(model: Any, prompter: Prompter) -> None:
    expected = greedy(model, prompter, PROMPTS, [8] * 6)
    changed = copy.deepcopy(model)
    changed.generation_config.repetition_penalty = 9.0
    changed.generation_config.eos_token_id = [1, expected[0][0]]
    changed.generation_config.temperature = 0.3
    assert greedy(changed, prompter, PROMPTS, [8] * 6) == expected


def test_greedy_of_nothing(model: Any, prompter: Prompter) -> None:
    assert greedy(model, prompter, [], []) == []


@pytest.mark.parametrize("tokens_per_batch", [4096, 60])
def test_scores_come_in_the_order_of_the_rows(
    model: Any, prompter: Prompter, monkeypatch: pytest.MonkeyPatch, tokens_per_batch: int
) -> None:
    monkeypatch.setattr(evaluation, "TOKENS_PER_BATCH", tokens_per_batch)
    texts = [
        ("The capital of France is", "Lyon."),
        ("Maria was", "born in Oslo."),
        ("I", "am"),
        ("The", "end of it all"),
    ]
    rows = [prompter.row(*text) for text in texts]
    found = score_targets(model, prompter, rows)
    for i, (prompt, target) in enumerate(texts):
        wanted = tail(prompter.tokenizer, prompt, target)
        ids = prompter.tokenizer(f"{prompt} {target}")["input_ids"]
        with torch.no_grad():
            guesses = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)[-len(wanted) - 1 : -1]
        right = [int(g.argmax()) == w for g, w in zip(guesses, wanted, strict=True)]
        log_prob = sum(float(g[w]) for g, w in zip(guesses, wanted, strict=True))
        assert bool(found.exact[i]) == all(right)
        assert float(found.token_accuracy[i]) == pytest.approx(sum(right) / len(right))
        assert float(found.log_prob[i]) == pytest.approx(log_prob, rel=1e-3)
        assert float(found.mean_log_prob[i]) == pytest.approx(log_prob / len(wanted), rel=1e-3)
    assert found.exact.tolist() == [True, True, False, False]


def requests() -> list[EditRequest]:
    """Some right, some wrong, of every kind of probe, and as many probes as to make the order of averages matter."""
    return [
        EditRequest(
            "0",
            "The capital of France is",
            "France",
            "Lyon.",
            probes=(
                Probe("generalization", "The capital of Peru is"),  # answered by another
                Probe("generalization", "The capital of France is"),
                Probe("generalization", "Maria was born in", target="Oslo."),
                Probe("locality", "Maria was born in", target="Oslo now"),
                Probe("locality", "The capital of Peru is", target="Lima"),
                Probe("portability", "The river of Peru runs slowly to the", target="sea."),
                Probe("portability", "The river of Peru runs slowly to the"),  # no answer recorded: not scored
                Probe("generation", "France is"),
                Probe("instance", "Is France a country?"),
            ),
        ),
        EditRequest("1", "The capital of Peru is", "Peru", "Oslo.", probes=(Probe("generalization", "Peru"),)),
        EditRequest("2", "Maria was born in", "Maria", "Oslo."),
    ]


def test_evaluate_equals_a_plain_loop(model: Any, prompter: Prompter) -> None:
    reference = LocalityReference()
    reference.collect(model, prompter, requests())
    edited = copy.deepcopy(model)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        head = edited.get_input_embeddings().weight
        # Enough to change some answers and not all of them.
        head[prompter.tokenizer("Lima")["input_ids"][-1]] += 3 * torch.randn(head.shape[1])
    tokenizer = prompter.tokenizer

    def hit(prompt: str, target: str) -> float:
        wanted = tail(tokenizer, prompt, target)
        return float(stepwise(edited, tokenizer, prompt, len(wanted)) == wanted)

    def same(prompt: str, length_of: str) -> float:
        n = len(tail(tokenizer, prompt, length_of))
        return float(stepwise(edited, tokenizer, prompt, n) == stepwise(model, tokenizer, prompt, n))

    expected: dict[str, list[float]] = {"reliability": [], "generalization": [], "locality": [], "portability": []}
    for request in requests():
        per_kind: dict[str, list[float]] = {kind: [] for kind in expected}
        per_kind["reliability"].append(hit(request.prompt, request.target_new))
        for probe in request.probes:
            if probe.kind == "generalization":
                per_kind["generalization"].append(hit(probe.prompt, probe.target or request.target_new))
            elif probe.kind == "locality":
                per_kind["locality"].append(same(probe.prompt, probe.target or request.target_new))
            elif probe.kind == "portability" and probe.target:
                per_kind["portability"].append(hit(probe.prompt, probe.target))
        for kind, hits in per_kind.items():
            if hits:
                expected[kind].append(sum(hits) / len(hits))
    found = evaluate(edited, prompter, requests(), reference)
    assert found == {kind: pytest.approx(sum(means) / len(means)) for kind, means in expected.items()}
    assert 0 < found["reliability"] < 1
    assert 0 < found["generalization"] < 1


def test_locality_of_the_unedited_model_is_one(model: Any, prompter: Prompter) -> None:
    """Also where it does not give the recorded answer, since that is not what counts."""
    reference = LocalityReference()
    assert reference.collect(model, prompter, requests()) == 2
    assert evaluate(model, prompter, requests(), reference)["locality"] == 1


def test_a_reference_is_taken_once_and_as_long_as_the_recorded_answer(model: Any, prompter: Prompter) -> None:
    prompt, tokenizer = "The river of Peru runs", prompter.tokenizer
    asked = [
        EditRequest("0", "In Rome", "Rome", "no", probes=(Probe("locality", prompt, target="slowly to"),)),
        EditRequest("1", "In Oslo", "Oslo", "no", probes=(Probe("locality", prompt, target="slowly"),)),
        EditRequest("2", "In Lima", "Lima", "a new target", probes=(Probe("locality", "The capital of Peru"),)),
    ]
    reference = LocalityReference()
    assert reference.collect(model, prompter, asked) == 2
    assert reference.answers == {
        prompt: stepwise(model, tokenizer, prompt, len(tail(tokenizer, prompt, "slowly to"))),
        "The capital of Peru": stepwise(
            model, tokenizer, "The capital of Peru", len(tail(tokenizer, "The capital of Peru", "a new target"))
        ),
    }
    before = copy.deepcopy(reference.answers)
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.get_input_embeddings().weight)
    assert reference.collect(other, prompter, asked) == 0
    assert reference.answers == before


def test_a_probe_without_an_answer_does_not_count(model: Any, prompter: Prompter) -> None:
    """After a finished sentence the model says nothing: there is nothing to compare with."""
    silent = Probe("locality", "The capital of France is Lyon.", target="It is")
    request = EditRequest("0", "Maria was born in", "Maria", "Oslo.", probes=(silent,))
    reference = LocalityReference()
    reference.collect(model, prompter, [request])
    assert reference.answers == {silent.prompt: []}
    assert evaluate(model, prompter, [request], reference) == {"reliability": 1.0}


def test_a_probe_that_is_too_long_names_its_record(model: Any, prompter: Prompter) -> None:
    request = EditRequest(
        "0", "Maria is", "Maria", "in", probes=(Probe("locality", "so " * 200, target="so"),), source="f.json, record 4"
    )
    with pytest.raises(RequestError, match=r"f\.json, record 4.*\d+ tokens"):
        LocalityReference().collect(model, prompter, [request])


def test_the_model_knows_its_sentences(model: Any, prompter: Prompter) -> None:
    """What the tests above rest on."""
    for sentence in SENTENCES:
        words = sentence.split(" ")
        prompt, rest = " ".join(words[:-1]), words[-1]
        if sum(s.startswith(prompt) for s in SENTENCES) == 1:
            assert stepwise(model, prompter.tokenizer, prompt, 40) == tail(prompter.tokenizer, prompt, rest)
