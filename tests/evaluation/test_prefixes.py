"""Texts that go on from beginnings run once come out as complete texts do."""

from __future__ import annotations

import itertools
import random
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import FAMILIES, OTHER_FAMILIES, tiny_model
from torch import Tensor, nn

from lit_edit.evaluation import prefixes, scores
from lit_edit.evaluation.prefixes import can_share, parts, plan
from lit_edit.evaluation.scores import greedy, score_targets
from lit_edit.model.prompts import Prompter, Row

HEADS = ("The capital of France is", "The capital of", "Maria was born in Oslo and works in", "Rome")
RESTS = (" Paris.", " Rome and Oslo", "", " France, where Maria was born", " a", " what it is")
Tiny = tuple[Any, Prompter]


def rows_of(prompter: Prompter) -> list[Row]:
    """Beginnings of beginnings, texts of very different lengths, one alone and one twice."""
    told = [(head + rest, target) for head in HEADS for rest in RESTS for target in ("Oslo", "Rome or so")]
    return [prompter.row(*text) for text in [*told, ("Zzz", "yes"), told[3]]]


def made(family: str) -> Tiny:
    model, tokenizer = tiny_model(family)
    return model.requires_grad_(False), Prompter(tokenizer, 128)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes cost nothing: whatever can be shared is."""
    monkeypatch.setattr(prefixes, "_PASS", {"cpu": 0})


def complete_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "can_share", lambda *_: False)


def tokens_run(model: Any) -> list[int]:
    """Grows by the padded tokens of every pass."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    return seen


@pytest.mark.parametrize("tokens", [4096, 90])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_scores_and_answers_are_those_of_complete_texts(
    family: str, cheap: None, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(scores, "TOKENS_PER_BATCH", tokens)
    model, prompter = made(family)
    rows, run = rows_of(prompter), tokens_run(model)
    prompts = [head + rest for head in HEADS for rest in RESTS]
    limits = [i % 4 for i in range(len(prompts))]
    shared, told = score_targets(model, prompter, rows), greedy(model, prompter, prompts, limits)
    few = sum(run)
    run.clear()
    complete_only(monkeypatch)
    whole = score_targets(model, prompter, rows)
    assert told == greedy(model, prompter, prompts, limits)
    assert few < sum(run)
    assert torch.equal(shared.exact, whole.exact)
    assert torch.equal(shared.token_accuracy, whole.token_accuracy)
    torch.testing.assert_close(shared.log_prob, whole.log_prob, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_and_half_precision_too(family: str, cheap: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompter = made(family)
    rows = rows_of(prompter)
    for change, accuracy in ((lambda: model.set_attn_implementation("eager"), 1e-5), (model.bfloat16, 0.5)):
        change()
        with monkeypatch.context() as patch:
            shared = score_targets(model, prompter, rows)
            complete_only(patch)
            whole = score_targets(model, prompter, rows)
        torch.testing.assert_close(shared.log_prob, whole.log_prob, rtol=0, atol=accuracy)


def test_a_plan_is_the_cheapest_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every set of beginnings, each at most so many deep."""
    draw = random.Random(0)
    for _ in range(60):
        keys = [tuple(draw.choices((0, 1), k=draw.randint(0, 5))) for _ in range(draw.randint(1, 6))]
        every = sorted({key[:n] for key in keys for n in range(1, len(key) + 1)}, key=len)
        every = [b for b in every if sum(key[: len(b)] == b for key in keys) > 1]
        level_cost, fixed = draw.choice([0, 1, 3]), draw.choice([0, 2])
        costs = []
        for n in range(min(len(every), 5) + 1):
            for chosen in itertools.combinations(every, n):
                above = {b: [a for a in chosen if len(a) < len(b) and b[: len(a)] == a] for b in chosen}
                if max((len(a) + 1 for a in above.values()), default=0) > prefixes.LEVELS:
                    continue
                run = sum(len(b) - max(map(len, above[b]), default=0) + 1 for b in chosen)
                run += sum(len(k) - max((len(b) for b in chosen if k[: len(b)] == b), default=0) for k in keys)
                levels = max((len(a) + 1 for a in above.values()), default=0)
                costs.append(run + levels * level_cost + (fixed if levels else 0))
        pieces, last = plan(keys, level_cost, fixed)
        found = sum(p.end - p.start + 1 for p in pieces)
        found += sum(len(key) - (pieces[i].end if i >= 0 else 0) for key, i in zip(keys, last, strict=True))
        levels = max((p.level + 1 for p in pieces), default=0)
        assert found + levels * level_cost + (fixed if levels else 0) == min(costs), keys
        for key, i in zip(keys, last, strict=True):
            while i >= 0:  # what a text is told it begins with
                piece = pieces[i]
                assert key[: piece.end] == keys[piece.text][: piece.end]
                assert piece.start == (pieces[piece.parent].end if piece.parent >= 0 else 0)
                i = piece.parent


def test_nothing_is_shared_where_it_does_not_pay() -> None:
    assert plan([(1, 2), (1, 3)], 64, 0) == ([], [-1, -1])
    pieces, last = plan([(*range(100), i) for i in range(3)], 64, 64)
    assert [(p.start, p.end, p.level) for p in pieces] == [(0, 100, 0)]
    assert last == [0, 0, 0]


@pytest.mark.parametrize("tokens", [64, 1])
def test_batches_are_bounded_with_what_lies_to_the_left(cheap: None, tokens: int) -> None:
    model, prompter = made("llama")
    texts = [row.ids for row in rows_of(prompter)]
    limits = [len(ids) - 1 for ids in texts]
    for room in (None, [2] * len(texts)):
        seen: list[int] = []
        for part in parts(model, texts, limits, prompter.pad_id, tokens, room):
            rows, left = len(part.rows), part.mask.shape[1] - part.ids.shape[1]
            width = part.mask.shape[1] if room else part.ids.shape[1] + left // prefixes._LEFT
            assert rows == 1 or rows * width <= 2 * tokens
            for i, ids, first in zip(part.rows, part.ids.tolist(), part.first.tolist(), strict=True):
                at = len(texts[i]) - 1 - first
                assert ids[at] == texts[i][-1]
            seen += part.rows
        assert sorted(seen) == list(range(len(texts)))


def test_texts_of_like_length_go_together() -> None:
    width = dict(enumerate([3, 50, 3, 4, 51, 3]))
    assert list(prefixes.batches(width, width, 4096, 10)) == [[0, 2, 5, 3], [1, 4]]
    assert list(prefixes.batches(width, width, 4096, 1000)) == [[0, 2, 5, 3, 1, 4]]
    assert list(prefixes.batches(width, width, 9, 1000)) == [[0, 2, 5], [3], [1], [4]]


def broken(model: Any) -> None:
    """Blocks that scale by the place in a pass, which is another one in a rest."""

    def scaled(_: nn.Module, __: Any, output: Any) -> Any:
        state: Tensor = output[0] if isinstance(output, tuple) else output
        moved = state * (1 + torch.arange(state.shape[1]) / 8)[:, None]
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    model.model.layers[1].register_forward_hook(scaled)


def failing(model: Any) -> None:
    def refuse(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("past_key_values") is not None:
            raise TypeError("no cache here")

    model.register_forward_pre_hook(refuse, with_kwargs=True)


@pytest.mark.parametrize(("spoil", "why"), [(broken, "do not give what complete"), (failing, "run: no cache here")])
def test_a_model_that_does_not_bear_it_is_found_out(
    cheap: None, monkeypatch: pytest.MonkeyPatch, spoil: Any, why: str
) -> None:
    model, prompter = made("llama")
    spoil(model)
    rows = rows_of(prompter)
    with pytest.warns(UserWarning, match=why) as caught:
        found = score_targets(model, prompter, rows)
    assert len(caught) == 1
    complete_only(monkeypatch)
    assert torch.equal(found.log_prob, score_targets(model, prompter, rows).log_prob)


def test_a_model_that_gives_no_numbers_is_not_spoken_of(cheap: None) -> None:
    model, prompter = made("llama")
    model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not score_targets(model, prompter, rows_of(prompter)).exact.any()


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 39}},
        {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}, "max_position_embeddings": 39},
        {"_attn_implementation": "flash_attention_2"},
    ],
)
def test_what_a_model_says_of_itself(changes: dict[str, Any]) -> None:
    model, _ = made("llama")
    settings = {"_attn_implementation": "sdpa", "max_position_embeddings": 40}
    said: Any = SimpleNamespace(
        training=False, forward=model.forward, get_output_embeddings=model.get_output_embeddings
    )
    said.config = SimpleNamespace(**settings)
    assert can_share(said, 40)
    said.config = SimpleNamespace(**settings | changes)
    assert not can_share(said, 40)
    assert can_share(model, 40)
    assert not can_share(model.train(), 40)
    said = SimpleNamespace(training=False, forward=lambda input_ids: input_ids)
    assert not can_share(said, 40)


def test_rows_that_have_ended_leave_their_batch() -> None:
    model, prompter = made("gpt2")
    run = tokens_run(model)
    greedy(model, prompter, ["Rome", "Oslo", "Lima", "Bern"], [1, 2, 2, 8])
    ends = run[1:]
    assert ends[0] == 4  # one of four has ended
    assert set(ends[1:]) == {1}


def test_the_same_text_is_scored_once() -> None:
    model, prompter = made("gpt2")
    run, row = tokens_run(model), prompter.row("The capital of France is", "Rome")
    found = score_targets(model, prompter, [row, prompter.row("Maria", "so"), row, row])
    assert sum(run) <= 2 * len(row.ids)
    assert found.log_prob[0] == found.log_prob[2] == found.log_prob[3] != found.log_prob[1]
