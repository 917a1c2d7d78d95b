"""Tiny random models of several families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

FAMILIES = ("gpt2", "llama", "qwen2")
_PLAIN = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
_GROUPED = _PLAIN | {"num_key_value_heads": 2}
OTHER_FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": _GROUPED | {"sliding_window": None},
    "qwen3": _GROUPED | {"head_dim": 8},
    "gemma2": _GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64},
    "gemma3_text": _GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64},
    "gemma3": {
        "text_config": _GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64},
        "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2}
        | {"image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "olmo2": _GROUPED,
    "phi": _GROUPED,
    "phi3": _GROUPED,
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 48, "n_positions": 128, "rotary_dim": 4}
    | {"initializer_range": 0.2},
    "gpt_neox": _PLAIN,
    "falcon": {k: v for k, v in _PLAIN.items() if k != "intermediate_size"} | {"ffn_hidden_size": 48},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "init_std": 0.2}
    | {"max_position_embeddings": 128, "word_embed_proj_dim": 32},
}
REPOSITORY = Path(__file__).resolve().parent.parent.parent


def tiny_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE with few merges, so that every word takes several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    core.train_from_iterator(["The capital of France is Paris.", "Maria was born in Oslo and works in Rome."], trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=128
    )


def tiny_config(family: str, vocabulary: int) -> Any:
    """Four layers of width 32; Llama's projection is square (32 to 32), where a guessed orientation would go unseen."""
    common: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if family == "gpt2":
        return GPT2Config(n_embd=32, n_layer=4, n_head=4, n_inner=48, n_positions=128, initializer_range=0.2, **common)
    if family == "gemma3":  # what concerns text stands apart, and its vision has more layers than its text
        parts = OTHER_FAMILIES[family]
        return AutoConfig.for_model(family, **parts | {"text_config": parts["text_config"] | common})
    if family not in FAMILIES:
        return AutoConfig.for_model(family, **common, **OTHER_FAMILIES[family])
    kind, inner = {"llama": (LlamaConfig, 32), "qwen2": (Qwen2Config, 48)}[family]
    return kind(
        hidden_size=32,
        intermediate_size=inner,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        **common,
    )


def tiny_model(family: str, seed: int = 0) -> tuple[Any, PreTrainedTokenizerFast]:
    """A random model and its tokenizer; Llama's adds a BOS token, the others' do not."""
    tokenizer = tiny_tokenizer(bos=family == "llama")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, len(tokenizer)))
    return model.eval(), tokenizer
