"""Keys: the inputs of a down-projection at the subject's last token, averaged over contexts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_edit.model.hooks import read_inputs
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest
from lit_edit.settings import Configured

ROWS_AT_ONCE = 256
"""Texts in a forward pass whose inputs of a layer are kept for all their tokens."""


class KeyAverage(Configured, ABC):
    """How the keys of one request, one per context, become its key."""

    @abstractmethod
    def average(self, keys: Tensor) -> Tensor:
        """(contexts, p), the bare prompt's key first, to (p,)."""


class MeanKey(KeyAverage):
    """The mean over contexts (ROME; MOSE Eq. 23)."""

    def average(self, keys: Tensor) -> Tensor:
        """(contexts, p) to (p,)."""
        return keys.mean(0)


class TypeMeanKey(KeyAverage):
    """The mean of the means per type of context: the bare prompt weighs one half (MEMIT, AlphaEdit)."""

    def average(self, keys: Tensor) -> Tensor:
        """(contexts, p) to (p,)."""
        return keys[0] if len(keys) == 1 else 0.5 * (keys[0] + keys[1:].mean(0))


class BareKey(KeyAverage):
    """The key of the bare prompt alone, without generated contexts."""

    def average(self, keys: Tensor) -> Tensor:
        """(contexts, p) to (p,)."""
        return keys[0]


def context_keys(workspace: Workspace, requests: Sequence[EditRequest], layer: int) -> list[Tensor]:
    """The keys of each request in every context, the bare prompt first: ``(p, contexts)`` in float32, not averaged."""
    return [keys.T for keys in _context_keys(workspace, requests, [layer])[layer]]


def compute_keys(
    workspace: Workspace, requests: Sequence[EditRequest], layers: Sequence[int], average: KeyAverage
) -> dict[int, Tensor]:
    """The keys of requests at several layers, in forward passes up to the last of them.

    Texts end with the subject's last token: under causal attention nothing to the right of it reaches its key. Keys
    that the workspace keeps are not computed again.

    Returns:
        For each layer (p, n) in float32, a column per request.
    """
    keys = workspace.keys.look_up(workspace, requests, layers, average)
    if keys is None:
        keys = _compute_keys(workspace, requests, layers, average)
        workspace.keys.keep(requests, average, keys)
    return keys


def _compute_keys(
    workspace: Workspace, requests: Sequence[EditRequest], layers: Sequence[int], average: KeyAverage
) -> dict[int, Tensor]:
    found = _context_keys(workspace, requests, layers)
    return {layer: torch.stack([average.average(k) for k in keys], dim=1) for layer, keys in found.items()}


@torch.no_grad()
def _context_keys(
    workspace: Workspace, requests: Sequence[EditRequest], layers: Sequence[int]
) -> dict[int, list[Tensor]]:
    """For each layer and request (contexts, p)."""
    modules = {layer: workspace.architecture[layer].projection for layer in layers}
    keys: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    together = max(1, ROWS_AT_ONCE // len(workspace.contexts))
    for first in range(0, len(requests), together):
        per_request = [workspace.rewriting_rows(request) for request in requests[first : first + together]]
        rows = [row.up_to_subject() for rows in per_request for row in rows]
        batch = workspace.prompter.collate(rows, workspace.device)
        with read_inputs(modules, batch.input_ids.shape[1], stop=True) as seen:
            workspace.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        at = torch.arange(len(rows), device=workspace.device)
        sizes = [len(rows) for rows in per_request]
        for layer in layers:
            keys[layer] += seen[layer][at, batch.subject_last].float().split(sizes)
    return keys
