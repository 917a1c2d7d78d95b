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
from lit_edit.evaluation.scores import greedy, score_targets
from lit_edit.model.prompts import Prompter

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
    monkeypatch.setattr(scores, "TOKENS_PER_BATCH", tokens_per_batch)
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
    monkeypatch.setattr(scores, "TOKENS_PER_BATCH", tokens_per_batch)
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


def test_the_model_knows_its_sentences(model: Any, prompter: Prompter) -> None:
    """What the tests above rest on."""
    for sentence in SENTENCES:
        words = sentence.split(" ")
        prompt, rest = " ".join(words[:-1]), words[-1]
        if sum(s.startswith(prompt) for s in SENTENCES) == 1:
            assert stepwise(model, prompter.tokenizer, prompt, 40) == tail(prompter.tokenizer, prompt, rest)
