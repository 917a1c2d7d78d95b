"""Causal tracing against a plain loop, one cell at a time, and what must hold whatever the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import tiny_model

from lit_edit.evaluation.tracing import (
    STATES,
    TOKENS,
    Trace,
    mean_trace,
    places,
    subject_spread,
    subject_tokens,
    trace_fact,
)
from lit_edit.model.families import FAMILIES
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest

FACT = EditRequest("1", "The river of old Peru runs to the", "old Peru", "Lima", target_true="sea")
SHORT = EditRequest("2", "Oslo is", "Oslo", "Rome", target_true="cold")


def test_places_by_hand() -> None:
    assert places(9, range(1, 5)) == dict(zip(TOKENS, (1, 2, 4, 5, 6, 8), strict=True))
    assert places(6, range(1, 4)) == {TOKENS[0]: 1, TOKENS[1]: 2, TOKENS[2]: 3, TOKENS[3]: 4, TOKENS[5]: 5}
    assert places(3, range(0, 2)) == {TOKENS[0]: 0, TOKENS[2]: 1, TOKENS[5]: 2}
    assert places(2, range(1, 2)) == {TOKENS[2]: 1, TOKENS[5]: 1}  # the prompt ends with the subject


@torch.no_grad()
def plain_effect(
    workspace: Workspace, request: EditRequest, shift: torch.Tensor, state: str, token: str, layers: list[int]
) -> tuple[float, float, float]:
    """(clean, corrupted, restored): one disturbed row at a time, states by hooks of torch alone."""
    model: Any = workspace.model
    ids, subject = subject_tokens(workspace, request)
    row = torch.tensor([ids])
    whole = workspace.prompter.row(request.prompt, str(request.target_true))
    answer, at = whole.ids[whole.target_start], places(len(ids), subject)[token]
    name = {STATES[0]: "block", STATES[1]: "projection", STATES[2]: "attention"}[state]
    modules = {layer: getattr(workspace.architecture[layer], name) for layer in layers}
    kept: dict[int, torch.Tensor] = {}

    def probability(noise: torch.Tensor | None, restore: bool) -> float:
        def disturb(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            out = output.clone()
            out[0, list(subject)] += noise  # type: ignore[arg-type]
            return out

        def touch(layer: int) -> Any:
            def hook(_: Any, __: Any, output: Any) -> Any:
                found = output[0] if isinstance(output, tuple) else output
                if noise is None:
                    kept[layer] = found.clone()
                elif restore:
                    found = found.clone()
                    found[0, at] = kept[layer][0, at]
                return (found, *output[1:]) if isinstance(output, tuple) else found

            return hook

        handles = [module.register_forward_hook(touch(layer)) for layer, module in modules.items()]
        if noise is not None:
            handles.append(model.get_input_embeddings().register_forward_hook(disturb))
        try:
            return float(model(row).logits[0, -1].softmax(-1)[answer])
        finally:
            for handle in handles:
                handle.remove()

    clean = probability(None, False)
    corrupted = [probability(noise, False) for noise in shift]
    restored = [probability(noise, True) for noise in shift]
    return clean, sum(corrupted) / len(corrupted), sum(restored) / len(restored)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("window", [1, 2])
def test_effects_are_those_of_a_plain_loop(kind: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_edit.evaluation.tracing.TOKENS_PER_BATCH", 100)  # several passes
    workspace = Workspace.of(*tiny_model(kind))
    spread = subject_spread(workspace, [FACT])
    found = trace_fact(workspace, FACT, spread, samples=2, window=window, seed=3)
    ids, subject = subject_tokens(workspace, FACT)
    embeddings = workspace.model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    assert spread == pytest.approx(float(embeddings[[ids[i] for i in subject]].std()), rel=1e-5)
    size = (2, len(subject), embeddings.shape[1])
    shift = 3.0 * spread * torch.randn(size, generator=torch.Generator().manual_seed(3))
    for state in STATES:
        for token in (TOKENS[2], TOKENS[4], TOKENS[5]):
            for layer in (0, 2, 3):
                together = range(layer, layer + window) if state != STATES[0] else [layer]
                layers = [one for one in together if one < 4]
                clean, corrupted, restored = plain_effect(workspace, FACT, shift, state, token, layers)
                assert found.clean == pytest.approx(clean, rel=1e-4)
                assert found.corrupted == pytest.approx(corrupted, rel=1e-4)
                assert found.effects[state][token][layer] == pytest.approx(restored - corrupted, abs=1e-6)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_what_holds_for_every_family(kind: str) -> None:
    """The last hidden state at the last token is the whole answer; nothing disturbed, nothing is given back."""
    workspace = Workspace.of(*tiny_model(kind))
    found = trace_fact(workspace, FACT, subject_spread(workspace, [FACT]), samples=2)
    assert list(found.effects) == list(STATES)
    assert found.effects[STATES[0]][TOKENS[5]][-1] == pytest.approx(found.clean - found.corrupted, abs=1e-6)
    assert all(len(layers) == 4 for by_token in found.effects.values() for layers in by_token.values())
    still = trace_fact(workspace, FACT, 0.0, samples=1)
    assert still.corrupted == pytest.approx(still.clean, rel=1e-5)
    assert max(abs(x) for by_token in still.effects.values() for layers in by_token.values() for x in layers) < 1e-6


def test_averages_over_facts() -> None:
    one = Trace(0.9, 0.1, {"MLP output": {TOKENS[2]: [0.1, 0.5], TOKENS[0]: [0.2, 0.0]}})
    other = Trace(0.7, 0.3, {"MLP output": {TOKENS[2]: [0.3, 0.1]}})
    found = mean_trace([one, other])
    assert (found.clean, found.corrupted, found.facts) == (0.8, 0.2, 2)
    assert found.effects["MLP output"][TOKENS[2]] == pytest.approx([0.2, 0.3])
    assert found.effects["MLP output"][TOKENS[0]] == [0.2, 0.0]
    assert found.strongest() == 1
    with pytest.raises(ValueError, match="no trace"):
        mean_trace([])


def test_without_a_recorded_answer_the_models_own_is_traced() -> None:
    workspace = Workspace.of(*tiny_model("llama"))
    own = EditRequest("1", SHORT.prompt, SHORT.subject, "Rome")
    found = trace_fact(workspace, own, 1.0, samples=1, tokens=[TOKENS[2]])
    ids, _ = subject_tokens(workspace, own)
    with torch.no_grad():
        best = float(workspace.model(torch.tensor([ids])).logits[0, -1].softmax(-1).max())
    assert found.clean == pytest.approx(best, rel=1e-4)
    assert list(found.effects[STATES[0]]) == [TOKENS[2]]
