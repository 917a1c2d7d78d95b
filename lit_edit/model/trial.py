"""What a model would say with other weights: forward passes under a change that is tried and not written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_edit.model.hooks import change_outputs, read_inputs
from lit_edit.model.prompts import Batch
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest


class Factors(NamedTuple):
    """``ΔW = left @ right``: (..., d, n) and (..., n, p); with a leading dimension each row of a batch has its own."""

    left: Tensor
    right: Tensor


def edit_batch(workspace: Workspace, requests: Sequence[EditRequest]) -> Batch:
    """The bare edit prompts with their targets, a row per request."""
    rows = [workspace.prompter.row(r.prompt, r.target_new, r.subject, r.source) for r in requests]
    return workspace.prompter.collate(rows, workspace.device)


def logits_with(workspace: Workspace, batch: Batch, weights: Mapping[int, Tensor]) -> Tensor:
    """The logits (rows, T, V) with other weights in some layers; differentiable in them.

    Args:
        workspace: Model, which stays as it is.
        batch: Texts.
        weights: For each layer a weight (d, p), in any floating dtype: it is rounded to the model's.
    """
    parts = [workspace.architecture[layer] for layer in weights]
    stored = {
        part.name: (weight.T if part.transposed else weight).to(part.weight.dtype)
        for part, weight in zip(parts, weights.values(), strict=True)
    }
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    logits: Tensor = functional_call(workspace.model, stored, kwargs=inputs).logits
    return logits


@contextmanager
def low_rank_change(workspace: Workspace, changes: Mapping[int, Factors]) -> Iterator[None]:
    """Adds ``x (left @ right)ᵀ`` to the outputs of projections while the block runs; differentiable in the factors."""
    modules = {layer: workspace.architecture[layer].projection for layer in changes}
    with read_inputs(modules) as seen:

        def adding(layer: int, change: Factors) -> Callable[[Tensor], Tensor]:
            def add(output: Tensor) -> Tensor:
                x = seen[layer].to(change.right.dtype)
                return output + (x @ change.right.mT @ change.left.mT).to(output.dtype)

            return add

        functions: dict[nn.Module, Callable[[Tensor], Tensor]] = {
            modules[layer]: adding(layer, change) for layer, change in changes.items()
        }
        with change_outputs(functions):
            yield


def target_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of the target under teacher forcing, the mean over its tokens: (rows,), float32 at least.

    Args:
        logits: (rows, T, V).
        labels: (rows, T), unshifted, -100 where there is no target.
    """
    wanted = labels[:, 1:]
    mask = wanted != -100
    predicted = logits[:, :-1][mask]
    predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
    losses = nn.functional.cross_entropy(predicted, wanted[mask], reduction="none")
    row = mask.nonzero()[:, 0]
    return torch.zeros(len(labels), dtype=losses.dtype, device=losses.device).index_add(0, row, losses) / mask.sum(1)


def last_token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The same with every target token predicted from the prompt's last token, none from another: (rows,).

    Args:
        logits: (rows, T, V).
        labels: (rows, T), unshifted, -100 where there is no target.
    """
    mask = labels != -100
    row, place = mask.nonzero(as_tuple=True)
    prompt_end = mask.int().argmax(1) - 1
    predicted = logits[torch.arange(len(labels), device=labels.device), prompt_end]
    log_p = predicted.to(torch.promote_types(predicted.dtype, torch.float32)).log_softmax(-1)
    losses = -log_p[row, labels[row, place]]
    return torch.zeros(len(labels), dtype=losses.dtype, device=losses.device).index_add(0, row, losses) / mask.sum(1)


@torch.no_grad()
def target_probability(logits: Tensor, labels: Tensor) -> list[float]:
    """p of the whole target under teacher forcing, a value per row."""
    found: list[float] = (-target_nll(logits, labels) * (labels[:, 1:] != -100).sum(1)).exp().tolist()
    return found
