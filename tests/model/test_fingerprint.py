"""Fingerprints: any change of what a model or tokenizer computes with is seen, and nothing else."""

from __future__ import annotations

import pytest
import torch
from helpers.models import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

from lit_edit.model.fingerprint import model_fingerprint, tokenizer_fingerprint


def test_a_model_is_known_by_its_values() -> None:
    model = tiny_model("llama")[0]
    reference = model_fingerprint(model)
    assert model_fingerprint(tiny_model("llama")[0]) == reference
    assert model_fingerprint(model.train()) == reference
    assert model_fingerprint(tiny_model("llama", seed=1)[0]) != reference
    assert model_fingerprint(tiny_model("llama")[0].bfloat16()) != reference
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
    assert model_fingerprint(model) != reference


def test_tied_and_transposed_parameters() -> None:
    tied = tiny_model("gpt2")[0]
    assert model_fingerprint(tied) == model_fingerprint(tiny_model("gpt2")[0])
    plain, viewed = nn.Linear(5, 7), nn.Linear(5, 7)
    viewed.weight = nn.Parameter(plain.weight.detach().T.contiguous().T)  # equal, stored the other way round
    viewed.bias = plain.bias
    assert model_fingerprint(viewed) == model_fingerprint(plain)


@pytest.mark.parametrize("shape", [(256, 1024), (64, 4096), (512, 384)])
def test_a_change_of_rank_one_is_seen_in_columns_that_a_plain_stride_would_miss(shape: tuple[int, int]) -> None:
    linear = nn.Linear(shape[1], shape[0], bias=False)
    reference = model_fingerprint(linear)
    key = torch.randn(shape[1], generator=torch.Generator().manual_seed(0))
    stride = -(-shape[0] * shape[1] // 65_536)
    key[torch.arange(0, shape[0] * shape[1], stride) % shape[1]] = 0
    assert 0.4 * shape[1] < int((key != 0).sum()) < shape[1]
    with torch.no_grad():
        linear.weight.add_(torch.outer(torch.ones(shape[0]), key))
    assert model_fingerprint(linear) != reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 301), (7,), (3, 5, 11), ()])
def test_every_single_value_is_seen(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.ones(shape, dtype=dtype))
    reference = model_fingerprint(holder)
    for index in {0, 1, holder.weight.numel() // 2, holder.weight.numel() - 1}:
        if index < holder.weight.numel():
            with torch.no_grad():
                holder.weight.view(-1)[index] = 1.5
                assert model_fingerprint(holder) != reference
                holder.weight.view(-1)[index] = 1.0
    assert model_fingerprint(holder) == reference


def test_it_does_not_depend_on_where_a_value_lies_in_memory() -> None:
    plain, shifted = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    room = torch.zeros(10)
    room[1:] = plain.weight.detach().reshape(-1)
    shifted.weight = nn.Parameter(room[1:].view(3, 3))
    assert model_fingerprint(shifted) == model_fingerprint(plain)


def test_a_tokenizer_is_known_whatever_it_was_called_with() -> None:
    tokenizer = tiny_model("llama")[1]
    reference = tokenizer_fingerprint(tokenizer)
    tokenizer("w1 w2 w3", truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == reference
    other = Tokenizer(WordLevel({"[UNK]": 0, "w2": 1}, unk_token="[UNK]"))
    assert tokenizer_fingerprint(PreTrainedTokenizerFast(tokenizer_object=other)) != reference
