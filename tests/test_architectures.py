from __future__ import annotations

from typing import Any

import pytest
import torch
from editing_references import make_workspace, projection_of
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2Model

from lit_edit.architectures import Architecture, UnsupportedModelError

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
BY_HAND = ("gpt2", "llama", "mistral", "qwen2")  # the others: tests/test_families.py
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


def test_in_place_writing_is_counted_in_the_parameters_version(tiny) -> None:
    part = make_workspace(tiny).architecture[2]
    stored = part.projection.weight
    versions = [stored._version]
    part.weight.add_(1.0)
    versions.append(stored._version)
    part.weight.copy_(torch.zeros_like(part.weight))
    versions.append(stored._version)
    part.weight[0, 0] = 1.0
    versions.append(stored._version)
    assert versions == sorted(set(versions))


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


def test_a_model_without_its_head_is_refused_with_advice() -> None:
    model = GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8, bos_token_id=0, eos_token_id=1))
    with pytest.raises(UnsupportedModelError, match=r"A GPT2Model .* lacks transformer\.h\..*AutoModelForCausalLM"):
        Architecture(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(tiny, dtype: torch.dtype) -> None:
    model, _ = tiny
    projection = projection_of(model, 2)
    projection.weight = nn.Parameter(torch.zeros(projection.weight.shape).to(dtype), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"layer 2 holds no plain floating-point matrix \(quantised"):
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
