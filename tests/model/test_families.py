from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from helpers.references import changed, hooks_left, make_workspace, projection_of, requests, weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2Model

from lit_edit import edit
from lit_edit.model.families import FAMILIES, Architecture, Family, UnsupportedModelError

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
BY_HAND = ("gpt2", "llama", "mistral", "qwen2")  # the others: test_family_descriptions.py
INNER = {"gpt2": "n_inner"}  # elsewhere intermediate_size


def small(kind: str, inner: int) -> Any:
    extra = {} if kind == "gpt2" else {"num_key_value_heads": 1}
    config = AutoConfig.for_model(kind, **SIZES, **extra, **{INNER.get(kind, "intermediate_size"): inner})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(("kind", "name"), [("mixtral", "num_local_experts"), ("qwen2_moe", "num_experts")])
def test_a_mixture_of_experts_is_named_for_what_it_is(kind: str, name: str) -> None:
    config = AutoConfig.for_model(kind, **SIZES, intermediate_size=24, num_key_value_heads=1, **{name: 3})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=r"mixture of 3 experts: every token .* Take a dense model"):
        Architecture(model)


@pytest.mark.parametrize("inner", [24, 16], ids=["oblong", "square"])
@pytest.mark.parametrize("kind", BY_HAND)
def test_the_projection_computes_weight_times_input_plus_bias(kind: str, inner: int) -> None:
    model = small(kind, inner)
    architecture = Architecture(model)
    assert len(architecture) == 3
    ids = torch.tensor([[2, 3, 4, 5, 6]])
    for index, part in enumerate(architecture.layers):
        assert part.index == index
        assert part.projection is projection_of(model, index)
        assert dict(model.named_parameters())[part.name] is part.projection.weight
        assert part.weight.shape == (16, inner)
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        handle = part.projection.register_forward_hook(lambda _, args, out, seen=seen: seen.append((args[0], out)))
        with torch.no_grad():
            model(input_ids=ids)
            handle.remove()
            key, out = seen[0]
            bias = getattr(part.projection, "bias", None)
            expected = key @ part.weight.T + (0 if bias is None else bias)
            torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inner", [24, 16], ids=["oblong", "square"])
@pytest.mark.parametrize("kind", BY_HAND)
@torch.no_grad()
def test_writing_to_the_weight_edits_the_block_as_delta_times_key(kind: str, inner: int) -> None:
    model = small(kind, inner)
    ids = torch.tensor([[2, 3, 4, 5, 6]])
    part = Architecture(model)[1]
    seen: list[Any] = []
    handles = [
        part.projection.register_forward_hook(lambda _, args, out: seen.append(args[0])),
        part.block.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)),
    ]
    logits = model(input_ids=ids).logits
    key, block = seen
    delta = torch.randn(16, inner, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    part.weight.add_(delta)
    seen.clear()
    edited = model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(seen[0], key, rtol=0, atol=0)
    torch.testing.assert_close(seen[1] - block, key @ delta.T, rtol=1e-10, atol=1e-10)
    assert (edited - logits).abs().max() > 1e-3


@pytest.mark.parametrize("index", [-1, 4, 100])
def test_a_layer_that_does_not_exist_is_refused(tiny, index: int) -> None:
    architecture = make_workspace(tiny).architecture
    with pytest.raises(ValueError, match=rf"Layer {index} does not exist: the model has layers 0 to 3\."):
        architecture[index]
    with pytest.raises(ValueError, match=rf"Layer {index} does not exist"):
        architecture.check([0, index])
    architecture.check([3, 0, 1, 2])


def test_what_is_no_language_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="type None are not described yet; known are falcon, gemma2"):
        Architecture(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("module", "transposed", "why"),
    [
        (
            "mlp.up_proj",
            False,
            r"layers\.\*\.mlp\.up_proj is not .*: mlp\.down_proj reads what it gives\. Name the weight",
        ),
        ("mlp.gate_proj", False, r"mlp\.down_proj reads what it gives"),
        ("self_attn.o_proj", False, r"mlp\.gate_proj reads what it gives"),
        ("self_attn.q_proj", False, r"self_attn\.o_proj reads what it gives"),
        ("self_attn.v_proj", False, r"it gives 16 features, the block's hidden states have 32"),
        ("mlp.down_proj", True, r"does not multiply its input \(32 features\).*It does with transposed: false\.$"),
    ],
)
def test_a_wrong_family_is_refused_though_every_shape_would_do(module: str, transposed: bool, why: str) -> None:
    model, tokenizer = tiny_model("llama")  # all of it square, 32 to 32
    with pytest.raises(UnsupportedModelError, match=why):
        Architecture(model, Family("model.layers", module, transposed))
    with pytest.raises(UnsupportedModelError, match=why):  # before anything is collected
        edit(model, tokenizer, requests(), "memit", corpus=[], family=Family("model.layers", module, transposed))


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_wrong_orientation_that_does_not_fit_is_refused_too(kind: str) -> None:
    model, _ = tiny_model(kind)
    right = FAMILIES[kind]
    with pytest.raises(UnsupportedModelError, match=f"It does with transposed: {str(right.transposed).lower()}"):
        Architecture(model, replace(right, transposed=not right.transposed))


@pytest.mark.parametrize("kind", ["gptj", "phi", "falcon", "gpt_neox"])
def test_beside_an_mlp_an_attentions_output_is_refused(kind: str) -> None:
    model, _ = tiny_model(kind)
    right = FAMILIES[kind]
    others = {"gptj": "attn.out_proj", "phi": "self_attn.dense", "falcon": "self_attention.dense"}
    others["gpt_neox"] = "attention.dense"
    own = right.down_projection.replace(".", r"\.")
    with pytest.raises(UnsupportedModelError, match=rf"computed beside {own}, from several tokens as an attention"):
        Architecture(model, replace(right, down_projection=others[kind]))


def test_a_family_that_names_no_blocks_is_refused() -> None:
    model, _ = tiny_model("llama")
    for blocks in ("model", "model.embed_tokens", "nowhere"):
        with pytest.raises(UnsupportedModelError, match=f"lacks {re.escape(blocks)}"):
            Architecture(model, Family(blocks, "mlp.down_proj"))
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(UnsupportedModelError, match=r"model\.layers of this LlamaForCausalLM holds no blocks"):
        Architecture(model, Family("model.layers", "mlp.down_proj"))
    model, _ = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match=r"lacks model\.layers\.\*\.mlp\.fc2"):
        Architecture(model, Family("model.layers", "mlp.fc2"))


def test_a_projection_that_does_not_run_or_of_which_nothing_comes_is_refused() -> None:
    model, _ = tiny_model("qwen2")
    for block in model.model.layers:
        block.mlp.spare = nn.Linear(48, 32)
    with pytest.raises(UnsupportedModelError, match="in block 0 it ran 0 times in one pass"):
        Architecture(model, Family("model.layers", "mlp.spare"))
    for block in model.model.layers:
        block.mlp.down_proj.register_forward_pre_hook(lambda _, args, mlp=block.mlp: (mlp.spare(args[0]), None)[1])
    with pytest.raises(UnsupportedModelError, match="the block's output does not depend on it"):
        Architecture(model, Family("model.layers", "mlp.spare"))
    Architecture(model, FAMILIES["qwen2"])


def test_a_wrong_layer_after_right_ones_is_found() -> None:
    model, _ = tiny_model("llama")
    odd = model.model.layers[3].mlp.down_proj
    odd.forward = lambda x: x @ odd.weight
    with pytest.raises(UnsupportedModelError, match=r"does not multiply its input .* in block 3"):
        Architecture(model, FAMILIES["llama"])


def test_the_check_leaves_a_model_as_it_was(tiny) -> None:
    model, _ = tiny
    model.train()
    model.get_submodule(FAMILIES[model.config.model_type].blocks)[1].eval()
    modes = [module.training for module in model.modules()]
    before, state = weights(model), torch.get_rng_state()
    Architecture(model, FAMILIES[model.config.model_type])
    assert [module.training for module in model.modules()] == modes
    assert changed(before, model) == set()
    assert hooks_left(model) == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_without_memory_are_not_run(tiny) -> None:
    model, _ = tiny
    right = FAMILIES[model.config.model_type]
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
    model.forward = None
    assert len(Architecture(model, right)) == 4


def test_a_model_without_its_head_is_refused_with_advice() -> None:
    model = GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8, bos_token_id=0, eos_token_id=1))
    with pytest.raises(UnsupportedModelError, match=r"A GPT2Model .* lacks transformer\.h\..*AutoModelForCausalLM"):
        Architecture(model)


def test_a_projection_without_a_plain_matrix_is_refused(tiny) -> None:
    model, _ = tiny
    projection = projection_of(model, 0)
    shape = projection.weight.shape
    for weight in (None, nn.Parameter(torch.zeros(shape.numel() // 2, 1, 2))):
        projection.weight = weight
        with pytest.raises(UnsupportedModelError, match="layer 0 holds no plain floating-point matrix"):
            Architecture(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ordinary_precisions_are_taken(tiny, dtype: torch.dtype) -> None:
    architecture = Architecture(tiny[0].to(dtype))
    assert architecture[0].weight.dtype == dtype
    assert architecture.device == torch.device("cpu")
