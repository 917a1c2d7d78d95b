"""Workspaces with made-up statistics, and parts of editors that show what they are given."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_edit.algebra.updates import Update
from lit_edit.editors.keys import KeyAverage
from lit_edit.editors.layers import Choice, LayerPolicy
from lit_edit.editors.solvers import Solver
from lit_edit.editors.values import ValueOptimizer
from lit_edit.model.edited_weight import EditedWeight
from lit_edit.model.families import Architecture
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest

from .references import CONTEXTS, make_workspace


def prepared(
    tiny: tuple[Any, Any], contexts: Sequence[str] = CONTEXTS, dtype: torch.dtype = torch.float64
) -> Workspace:
    """A workspace on a copy of a model, with covariances of decaying spectrum and gradients in place of a corpus."""
    workspace = make_workspace((copy.deepcopy(tiny[0]), tiny[1]), contexts, dtype)
    generator = torch.Generator().manual_seed(5)
    for part in workspace.architecture.layers:
        d, p = part.weight.shape
        basis = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float64)).Q
        site = workspace.site(part.index)
        site.covariance = (basis / torch.arange(1, p + 1)) @ basis.T
        site.gradient = torch.randn(d, p, generator=generator, dtype=torch.float64)
    return workspace


def states(workspace: Workspace) -> dict[int, dict[str, Tensor]]:
    """What a checkpoint holds of every layer."""
    return {layer: site.state_dict() for layer, site in workspace.sites.items()}


def continued(workspace: Workspace, tiny: tuple[Any, Any]) -> Workspace:
    """A new workspace of the same model that goes on from what the other one leaves in a checkpoint."""
    file = io.BytesIO()
    torch.save(states(workspace), file)
    file.seek(0)
    fresh = prepared(tiny, workspace.contexts, workspace.architecture[0].weight.dtype)
    for layer, state in torch.load(file, weights_only=True).items():
        fresh.site(layer).load_state_dict(state)
    fresh.history, fresh.last_number = dict(workspace.history), workspace.last_number
    fresh.finished_at = workspace.finished_at
    return fresh


class Assigned(LayerPolicy):
    """Gives each request the layers set for it."""

    def __init__(self, layers: dict[str, tuple[int, ...]]) -> None:
        self.layers = layers

    def candidates(self, architecture: Architecture) -> list[int]:
        return sorted({layer for layers in self.layers.values() for layer in layers})

    def choose(
        self,
        workspace: Workspace,
        requests: Sequence[EditRequest],
        values: ValueOptimizer,
        average: KeyAverage,
        value_average: KeyAverage | None = None,
    ) -> list[Choice]:
        return [Choice(self.layers[r.case_id], self.layers[r.case_id][-1], {}) for r in requests]


@dataclass
class Asked:
    """What a solver was asked, with the layer as it was then."""

    layer: int
    weight: Tensor
    exact: Tensor
    remembered: Tensor
    keys: Tensor
    targets: Tensor


class Recording(Solver):
    """Another solver, and everything it was asked."""

    def __init__(self, inner: Solver) -> None:
        super().__init__(inner.use_memory)
        self.inner, self.asked, self.mixes_keys = inner, list[Asked](), inner.mixes_keys

    def _solve(self, site: EditedWeight, keys: Tensor, targets: Tensor, value_keys: Tensor | None) -> Update:
        now = site.weight.clone(), site.exact.dense().clone(), self.remembered(site).double()
        self.asked.append(Asked(site.layer, *now, keys, targets))
        return self.inner.solve(site, keys, targets, value_keys)
