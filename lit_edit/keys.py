"""Keys: the inputs of a down-projection at the subject's last token, averaged over contexts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_edit.requests import EditRequest
from lit_edit.taps import read_inputs

if TYPE_CHECKING:
    from lit_edit.workspace import Workspace

ROWS_AT_ONCE = 256
"""Texts in a forward pass whose inputs of a layer are kept for all their tokens."""


class KeyAverage(ABC):
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


@dataclass
class KeptKeys:
    """The keys of the batch being edited, for as long as neither a weight nor the contexts change.

    An edit asks for the same keys several times: where its layers are chosen, where its values start from, and where
    its first layer is solved for.
    """

    _of: Any = None
    _keys: dict[tuple[KeyAverage, int, str, str, str], Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Forgets all: another batch begins."""
        self._keys.clear()

    def look_up(
        self, workspace: Workspace, requests: Sequence[EditRequest], layers: Sequence[int], average: KeyAverage
    ) -> dict[int, Tensor] | None:
        """The keys as `compute_keys` gives them, if all are there."""
        now = (tuple(workspace.contexts), [(id(p), p._version) for p in workspace.model.parameters()])
        if now != self._of:
            self._of = now
            self.clear()
        found = {layer: [self._keys.get(_name(average, layer, r)) for r in requests] for layer in layers}
        kept = {layer: [key for key in keys if key is not None] for layer, keys in found.items()}
        if not requests or any(len(keys) < len(requests) for keys in kept.values()):
            return None
        return {layer: torch.stack(keys, dim=1) for layer, keys in kept.items()}

    def keep(self, requests: Sequence[EditRequest], average: KeyAverage, keys: dict[int, Tensor]) -> None:
        """Keeps what `look_up` did not find."""
        for layer, found in keys.items():
            for i, request in enumerate(requests):
                self._keys[_name(average, layer, request)] = found[:, i]


def _name(average: KeyAverage, layer: int, request: EditRequest) -> tuple[KeyAverage, int, str, str, str]:
    return average, layer, request.prompt, request.subject, request.target_new


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


@torch.no_grad()
def _compute_keys(
    workspace: Workspace, requests: Sequence[EditRequest], layers: Sequence[int], average: KeyAverage
) -> dict[int, Tensor]:
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
            found = seen[layer][at, batch.subject_last].float().split(sizes)
            keys[layer] += [average.average(k) for k in found]
    return {layer: torch.stack(found, dim=1) for layer, found in keys.items()}
