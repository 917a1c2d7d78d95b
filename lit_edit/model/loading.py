"""Loading models and tokenizers, with errors that say what to do."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

EMBEDDED, AUTO = "embedded", "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZERS = ("tokenizer.*", "*vocab*", "spiece.model", "sentencepiece*", "tekken.json")


class LoadingError(ValueError):
    """A model or corpus that cannot be loaded."""


def embedded_path(*parts: str) -> Path:
    """A file or folder of the embedded world, as a path."""
    with as_file(files("lit_edit.world").joinpath(*parts)) as path:
        return path


def on_terminal() -> bool:
    """Whether somebody watches: a progress bar in a log file is only noise."""
    return sys.stderr.isatty()


@contextmanager
def transformers_bars(shown: bool) -> Iterator[None]:
    """Keeps the progress bars of `transformers` as they are, or leaves them out inside."""
    if shown or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def load_model(
    name: str = EMBEDDED, dtype: str = "float32", device: str | torch.device = "cpu"
) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer.

    Args:
        name: ``embedded`` for the model in the package, a folder, or a name on the Hugging Face hub. Code from a
            model's repository is never run.
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto`` is that of the stored weights.
        device: Device to put it on.

    Raises:
        LoadingError: if there is no such model, it is no causal language model, or its weights are quantised.
    """
    if dtype not in (*DTYPES, AUTO):
        raise LoadingError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}, {AUTO}.")
    where = str(embedded_path("model")) if name == EMBEDDED else name
    looks_like_path = name != EMBEDDED and (name.startswith((".", "/", "~")) or Path(name).exists())
    if looks_like_path:
        where = str(Path(name).expanduser())
    if looks_like_path and not (Path(where) / "config.json").is_file():
        raise LoadingError(f"{name}: no model there (a folder with config.json, weights and tokenizer is needed).")
    if looks_like_path and not any(found for pattern in _TOKENIZERS for found in Path(where).glob(pattern)):
        raise LoadingError(
            f"{name}: there is a model, but no tokenizer (tokenizer.json, or the vocabulary it is made of): save it "
            f"there, AutoTokenizer.from_pretrained(...).save_pretrained({name!r})."
        )
    try:
        # Before anything that needs a quantisation library: the user would be told to install it, in vain.
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        refuse_quantised(name, config)
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        with transformers_bars(on_terminal() and name != EMBEDDED):  # the embedded model loads at once
            model: nn.Module = AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype_of(dtype, config), trust_remote_code=False
            )
    except LoadingError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoadingError(f"The model {name!r} cannot be loaded: {first}") from error
    return model.to(device), tokenizer


def dtype_of(name: str, config: Any) -> torch.dtype:
    """A dtype by its name; ``auto`` is the one that a model's configuration says its weights are stored in.

    Raises:
        LoadingError: If they are stored in one that cannot be edited.
    """
    if name != AUTO:
        return DTYPES[name]
    found = getattr(config, "dtype", None) or torch.float32
    if found not in DTYPES.values():
        raise LoadingError(f"The model is stored in {found}: name one of {', '.join(DTYPES)} as its dtype.")
    return found


def refuse_quantised(name: str, config: Any) -> None:
    """Raises for a model whose weights are stored in a form that an edit cannot be written to.

    Args:
        name: Name of the model, for people.
        config: Configuration, as `AutoConfig` reads it.

    Raises:
        LoadingError: naming how the weights are quantised, whether or not a library for it is installed.
    """
    found = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if not found:
        return
    settings: dict[str, Any] = dict(found if isinstance(found, dict) else found.to_dict())
    method = getattr(settings.get("quant_method"), "value", settings.get("quant_method")) or "an unknown method"
    bits = _bits(str(method), settings)
    raise LoadingError(
        f"The model {name!r} is quantised ({method}{f', {bits} bits' if bits else ''}): what it stores is not the "
        "weight itself, and an edit cannot be written to it. Load the model that it was made from, unquantised."
    )


def _bits(method: str, settings: dict[str, Any]) -> int | None:
    """How many bits a quantised weight is stored in; None where the settings do not say."""
    for name, bits in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if settings.get(name) or settings.get(f"_{name}"):
            return bits
    for name in ("bits", "w_bit", "nbits", "num_bits"):
        if isinstance(settings.get(name), int):
            return int(settings[name])
    groups = settings.get("config_groups")
    if isinstance(groups, dict):
        weights = [group.get("weights") or {} for group in groups.values() if isinstance(group, dict)]
        stored = {int(group["num_bits"]) for group in weights if group.get("num_bits")}
        return stored.pop() if len(stored) == 1 else None
    said = re.search(r"(?:fp|float|int|mxfp)(\d+)", method)
    return int(said[1]) if said else None


def push_model(model: Any, tokenizer: Any, name: str, card: str, private: bool = True) -> None:
    """Uploads a model to the Hugging Face hub, by `transformers`, with its tokenizer and a model card.

    Args:
        model: A causal language model of `transformers`.
        tokenizer: Its tokenizer.
        name: Of the repository, ``owner/name``; made if need be.
        card: Its README.
        private: Whether a new repository is.

    Raises:
        LoadingError: If that fails.
    """
    from huggingface_hub import ModelCard

    try:
        model.push_to_hub(name, private=private)
        tokenizer.push_to_hub(name, private=private)
        ModelCard(card).push_to_hub(name)
    except Exception as error:  # of the hub's client, its HTTP library or the disk, without a common base
        why = " ".join(str(error).split())
        raise LoadingError(
            f"{name!r} was not uploaded ({type(error).__name__}: {why}): `hf auth login` gives this machine a token."
        ) from error


def save_model(model: Any, tokenizer: Any, folder: str | Path, max_shard_size: str = "5GB") -> None:
    """Writes a model as plain `transformers` loads it, with its generation settings, tokenizer and chat template.

    Args:
        model: A causal language model of `transformers`; tied weights are written once and tied again when loaded.
        tokenizer: Tokenizer of the model.
        folder: Folder; made if missing.
        max_shard_size: Weights are split into files of at most this size (``5GB``, ``200MB``).

    Raises:
        LoadingError: if a weight is not finite, the size cannot be read or the folder cannot be written.
    """
    if not re.fullmatch(r"[1-9]\d*([KMGT]i?B)", max_shard_size, re.IGNORECASE):
        raise LoadingError(f"max_shard_size {max_shard_size!r} is no size: 5GB and 200MB are.")
    broken = next((name for name, p in model.named_parameters() if not torch.isfinite(p).all()), None)
    if broken is not None:
        raise LoadingError(
            f"The weight {broken!r} holds values that are not finite: the model is not written. Go back to a checkpoint"
            " "
            "from before the edits that broke it."
        )
    try:
        with transformers_bars(on_terminal()):
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise LoadingError(f"The model cannot be written to {folder}: {error}") from error
