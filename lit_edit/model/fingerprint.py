"""What a model or a tokenizer is known again by: SHA-256 of what it computes with."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE = 65_536


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the model's parameters: names, shapes, dtypes and values.

    Of the values two things count. One is their sum: all bytes of a parameter, taken as whole numbers of eight bytes,
    modulo 2⁶⁴. It is exact, so that neither the device nor the number of threads plays a part, and a change of a single
    value changes it for certain. The other is a sample of at most 65,536 values, evenly strided, the stride having no
    divisor in common with the length of a row: a sample from a few columns alone would not see a change in the others.
    A tied parameter counts once, under its first name.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().contiguous().reshape(-1)
        stride = max(1, -(-flat.numel() // _SAMPLE))
        while math.gcd(stride, parameter.shape[-1] if parameter.ndim else 1) != 1:
            stride += 1
        digest.update(json.dumps([name, list(parameter.shape), str(parameter.dtype), _sum(flat)]).encode())
        digest.update(flat[::stride].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sum(flat: Tensor) -> int:
    """The sum of a tensor's bytes as little-endian numbers of eight bytes, modulo 2⁶⁴; what is left over is added."""
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    data = flat.view(torch.uint8)
    whole = len(data) // 8 * 8
    left = int.from_bytes(bytes(data[whole:].tolist()), "little")
    return (int(data[:whole].view(torch.int64).sum()) + left) % 2**64


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what a tokenizer does to a text: its backend's definition, or else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else dict(tokenizer.get_vocab())
    # These two record how the tokenizer was last called.
    definition = {key: value for key, value in definition.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()
