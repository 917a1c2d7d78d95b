"""Every described family, and the finder for those that are not, on tiny random models."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from editing_references import CONTEXTS, requests, tokens, weights
from tiny_models import FAMILIES as MAIN_FAMILIES
from tiny_models import OTHER_FAMILIES, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BloomConfig, MixtralConfig

from lit_edit import EditRequest, edit
from lit_edit.architectures import FAMILIES, Architecture, Family, UnsupportedModelError, find_family
from lit_edit.keys import BareKey, compute_keys
from lit_edit.suffix import cut, supported
from lit_edit.taps import change_outputs
from lit_edit.workspace import Workspace

EVERY = [*MAIN_FAMILIES, *OTHER_FAMILIES]
each_family = pytest.mark.parametrize("kind", EVERY)
# Models whose MLP output is normalised before it is added: a change of the weight reaches the stream through the norm.
NORMALISED = {"gemma2", "gemma3_text", "olmo2"}


def test_every_family_that_is_described_is_tested() -> None:
    assert set(EVERY) == set(FAMILIES)


def modules_named(block: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in block.named_modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2}


@each_family
def test_the_projection_is_the_one_module_that_maps_the_inner_width_to_the_models(kind: str) -> None:
    model, _ = tiny_model(kind)
    architecture = Architecture(model)
    assert len(architecture) == 4
    inner = 32 if kind == "llama" else 48
    for part in architecture.layers:
        assert part.weight.shape == (32, inner)
        assert dict(model.named_parameters())[part.name] is part.projection.weight
        if inner != 32:
            fitting = [
                m
                for m in modules_named(part.block).values()
                if sorted(m.weight.shape) == [32, 48] and m is part.projection
            ]
            assert fitting == [part.projection]


@each_family
def test_it_computes_weight_times_input_plus_bias(kind: str) -> None:
    model, _ = tiny_model(kind)
    part = Architecture(model.double())[2]
    seen: list[tuple[Tensor, Tensor]] = []
    handle = part.projection.register_forward_hook(lambda _, args, out: seen.append((args[0], out.clone())))
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7, 8]]))
        handle.remove()
        key, out = seen[0]
        bias = getattr(part.projection, "bias", None)
        torch.testing.assert_close(out, key @ part.weight.T + (0 if bias is None else bias), rtol=1e-9, atol=1e-9)


@each_family
def test_the_key_is_the_input_at_the_subjects_last_token(kind: str) -> None:
    model, tokenizer = tiny_model(kind)
    workspace = Workspace.of(model.double().requires_grad_(False), tokenizer, CONTEXTS)
    keys = compute_keys(workspace, requests(), [1], BareKey())[1]
    seen: list[Tensor] = []
    handle = workspace.architecture[1].projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for i, request in enumerate(requests()):
        ids, _, last = tokens(tokenizer, "", request)
        seen.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        alone = seen[0].reshape(len(ids), -1)[last]
        torch.testing.assert_close(keys[:, i], alone.float(), rtol=1e-4, atol=1e-5)
    handle.remove()


@each_family
def test_cut_passes_equal_complete_ones_or_are_not_offered(kind: str) -> None:
    model, tokenizer = tiny_model(kind)
    workspace = Workspace.of(model.double().requires_grad_(False), tokenizer, CONTEXTS)
    parts = workspace.architecture.layers
    blocks = [part.block for part in parts]
    if not supported(model, blocks):
        assert kind in {"gemma2", "gemma3_text"}  # some of their layers attend to a window only
        return
    batch = workspace.prompter.collate([r for q in requests() for r in workspace.rewriting_rows(q)], "cpu")
    rows = torch.arange(len(batch.input_ids))
    delta = torch.randn(len(rows), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def shift(column: Tensor) -> Any:
        return lambda out: out.index_put((rows, column), out[rows, column] + delta)

    last = batch.attention_mask.sum(1) - 1
    with torch.no_grad():
        with change_outputs({parts[2].projection: shift(batch.subject_last)}, batch.input_ids.shape[1]):
            whole = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        suffixes = cut(model, blocks, batch, [2]).select(range(len(rows)), [2] * len(rows))
        changes = {parts[2].projection: shift(torch.zeros_like(rows))}
        part = suffixes.logits(rows, last - batch.subject_last, changes)
    torch.testing.assert_close(part, whole[rows, last], rtol=1e-9, atol=1e-9)


@each_family
@pytest.mark.parametrize("method", ["rome", "mose"])
def test_an_edit_makes_the_new_target_likelier(kind: str, method: str) -> None:
    model, tokenizer = tiny_model(kind)
    before = weights(model)
    editor = quick(method)
    fact = EditRequest("1", "The capital of France is", "France", "Oslo")
    model, journal = edit(model, tokenizer, [fact], editor, corpus=TEXTS, corpus_tokens=4000)
    # Random models of four layers cannot be brought to say anything whatever; what counts is that it gets likelier.
    assert min(journal[0].p_value, journal[0].p_target) > first_guess(kind)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {Architecture(model)[layer].name for layer in journal[0].layers}


TEXTS = [
    f"The {a} of {b} is known for its {c}." for a in ("king", "river") for b in ("Oslo", "Rome") for c in "abcdefgh"
]


def first_guess(kind: str) -> float:
    """p(target) of the untouched model."""
    model, tokenizer = tiny_model(kind)
    ids = tokenizer("The capital of France is Oslo")["input_ids"]
    start = len(tokenizer("The capital of France is")["input_ids"])
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return float(sum(log_p[t - 1, ids[t]] for t in range(start, len(ids))).exp())


def quick(method: str) -> Any:
    """A configuration's editor in one layer, without contexts and KL."""
    from lit_edit import load_editor
    from lit_edit.layers import FixedLayers

    editor = load_editor(method)
    editor.layers = FixedLayers([2])
    editor._contexts = (0, 1)
    editor.values.steps, editor.values.kl_factor = 15, 0.0
    if method == "rome":
        editor.solver.needs_covariance = False
    else:
        editor.solver.preservation = 1e-6
    return editor


@pytest.mark.parametrize("kind", [k for k in EVERY if k != "llama"])
def test_the_finder_finds_what_is_described(kind: str) -> None:
    model, _ = tiny_model(kind)
    assert find_family(model) == FAMILIES[kind]
    assert not any(module._forward_hooks for module in model.modules())


def bloom() -> Any:
    return AutoModelForCausalLM.from_config(
        BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=12, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    )


def test_an_unknown_family_is_described_as_found_and_taken_when_confirmed() -> None:
    model = bloom()
    with pytest.raises(UnsupportedModelError, match="'bloom' are not described yet") as error:
        Architecture(model)
    said = re.search(
        r"confirm it: --model.family='\{blocks: (\S+), down_projection: (\S+), transposed: (\w+)\}'", str(error.value)
    )
    assert said
    family = Family(said[1], said[2], said[3] == "true")
    assert family == Family("transformer.h", "mlp.dense_4h_to_h")
    assert Architecture(model, family)[1].weight.shape == (16, 64)


def test_a_square_projection_of_an_unknown_family_is_not_guessed() -> None:
    model, _ = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match=r"cannot be told: 0 candidates among .*down_proj \(32 to 32\)"):
        find_family(model)


def test_a_mixture_of_experts_is_not_guessed_either() -> None:
    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=2, vocab_size=12, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"'mixtral' are not described yet.*candidates among"):
        Architecture(AutoModelForCausalLM.from_config(config))
