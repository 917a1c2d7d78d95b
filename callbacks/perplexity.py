"""How well the model still predicts ordinary text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lit_edit.model.loading import EMBEDDED, embedded_path
from lit_edit.model.prompts import Prompter

from .every_n import EveryNEdits


class Perplexity(EveryNEdits):
    """Logs ``perplexity`` of texts every N edits: ``exp`` of the mean loss of a token, over all tokens of all texts.

    The first sign of a collapse, for `CollapseGuard`. Works in any LightningModule that holds a causal language model
    of `transformers` as ``model`` and its tokenizer as ``tokenizer``.

    Cost: a forward pass over ``n_texts`` texts, cut to what the model takes.

    Args:
        texts: The texts; or a file with one in each line; or ``embedded`` for the embedded model's held-out text.
        n_texts: Number of texts at most.
        every_n: Edits between two measurements, or the counts to measure at.
        at_start: Also measure before the first edit.
        at_end: Also measure the last count of the run.

    Raises:
        ValueError: If no text has two tokens, or the number is not positive.
        OSError: If the file cannot be read.
        TypeError: At the start of a fit, if the module has no model and tokenizer.
    """

    def __init__(
        self,
        texts: str | list[str] = EMBEDDED,
        n_texts: int = 50,
        every_n: int | list[int] = 25,
        at_start: bool = True,
        at_end: bool = True,
    ) -> None:
        super().__init__(every_n, at_start, at_end)
        if n_texts < 1:
            raise ValueError(f"n_texts should be positive, it is {n_texts}.")
        self.texts = read_texts(texts)[:n_texts]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (hasattr(pl_module, "model") and hasattr(pl_module, "tokenizer")):
            raise TypeError(f"Perplexity needs `model` and `tokenizer` in {type(pl_module).__name__}.")

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
        model: Any = pl_module.model
        return {"perplexity": perplexity(model, Prompter.of(model, pl_module.tokenizer), self.texts)}


def read_texts(texts: str | list[str]) -> list[str]:
    """Texts as they are given, the lines of a file that are not empty, or those of the embedded held-out text.

    Raises:
        ValueError: If there is none.
        OSError: If the file cannot be read.
    """
    if isinstance(texts, str):
        path = embedded_path("data", "text-heldout.txt") if texts == EMBEDDED else Path(texts).expanduser()
        texts = path.read_text(encoding="utf-8").splitlines()
    found = [text for text in texts if text.strip()]
    if not found:
        raise ValueError("There is no text: give some, or a file with one in each line.")
    return found


@torch.no_grad()
def perplexity(model: nn.Module, prompter: Prompter, texts: list[str]) -> float:
    """``exp`` of the mean loss of a token; infinite where that leaves the range of numbers, NaN for a broken model.

    Args:
        model: A causal language model of `transformers`.
        prompter: Its tokenisation.
        texts: What it should predict; each is cut to the longest that the model takes.

    Raises:
        ValueError: If no text has two tokens.
    """
    total, number = 0.0, 0
    device = next(model.parameters()).device
    for text in texts:
        ids = torch.tensor([prompter.encode(text)[0][: prompter.max_length]], device=device)
        if ids.shape[1] < 2:
            continue
        logits = model(input_ids=ids).logits[0, :-1].double()
        total += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        number += ids.shape[1] - 1
    if not number:
        raise ValueError("No text has two tokens, so that there is nothing to predict.")
    mean = total / number
    return math.inf if mean > math.log(torch.finfo(torch.float64).max) else math.exp(mean)
