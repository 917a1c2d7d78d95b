"""The locate-then-edit family: layers, keys, values and a closed-form solver, each a part of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_edit.editors.base import Applied, Editor, Plan
from lit_edit.keys import KeyAverage, MeanKey, compute_keys
from lit_edit.layers import LayerPolicy
from lit_edit.requests import EditRequest
from lit_edit.solvers import Problem, Solver
from lit_edit.values import ValueOptimizer, ValueProblem, Values, block_outputs
from lit_edit.workspace import Workspace


class LocateThenEdit(Editor):
    """ROME, MEMIT, AlphaEdit, MOSE and what can be put together from their parts.

    Layers of a request are worked through in ascending order, keys computed anew on the model as edited so far. Where
    values belong to each layer (``values.site: mlp``) every layer is brought to its own v*; where they belong to the
    last block (``block``), each layer takes an equal share of what is still missing there (MEMIT's spreading).

    Args:
        layers: which layers a request is edited in.
        values: the optimisation of v*.
        solver: from keys and values to an update.
        keys: how keys are averaged over contexts.
        contexts: number of generated context prefixes.
        context_length: their length in tokens.
    """

    def __init__(
        self,
        layers: LayerPolicy,
        values: ValueOptimizer,
        solver: Solver,
        keys: KeyAverage | None = None,
        contexts: int = 5,
        context_length: int = 10,
    ) -> None:
        if contexts < 0 or context_length < 1:
            raise ValueError("An editor needs contexts >= 0 and context_length >= 1.")
        layers.check(values)
        self.layers, self.values, self.solver = layers, values, solver
        self.keys = keys if keys is not None else MeanKey()
        self._contexts = (contexts, context_length)
        self.memory: dict[int, Tensor] = {}  # per layer (p, m): keys of past edits

    @property
    def context_sampling(self) -> tuple[int, int]:
        """(number, length) of generated prefixes."""
        return self._contexts

    @property
    def needs_covariances(self) -> bool:
        """As the solver says."""
        return self.solver.needs_covariance

    def check(self, workspace: Workspace, batch_size: int) -> None:
        """Refuses a batch size or a covariance that the solver cannot take."""
        self.solver.check_batch_size(batch_size)
        for layer, covariance in workspace.covariances.items():
            part = workspace.architecture[layer]
            self.solver.check_covariance(covariance, part.name, part.weight.device)

    def editable_layers(self, workspace: Workspace) -> list[int]:
        """As the layer policy says."""
        return self.layers.candidates(workspace.architecture)

    def plan(self, workspace: Workspace, requests: Sequence[EditRequest]) -> Plan:
        """Chooses layers and optimises v*, all requests of the batch together."""
        choices = self.layers.choose(workspace, requests, self.values, self.keys)
        at_block = self.values.site == "block"
        problems = [ValueProblem(i, c.layers[-1:] if at_block else c.layers) for i, c in enumerate(choices)]
        values = self.values.optimise(workspace, requests, problems, self.keys)
        return Plan(list(requests), [c.layers for c in choices], values.loss, values.probability, values.steps, values)

    @torch.no_grad()
    def apply(self, workspace: Workspace, plan: Plan) -> list[Applied]:
        """Solves and applies layer by layer; remembers the keys afterwards."""
        values: Values = plan.data
        applied: list[Applied] = []
        used: dict[int, Tensor] = {}
        for layer in sorted({layer for layers in plan.layers for layer in layers}):
            mine = [i for i, layers in enumerate(plan.layers) if layer in layers]
            requests = [plan.requests[i] for i in mine]
            keys = compute_keys(workspace, requests, [layer], self.keys)[layer]
            part = workspace.architecture[layer]
            if self.values.site == "block":
                targets = part.weight.float() @ keys + self._share(workspace, plan, values, layer, mine)
            else:
                targets = torch.stack([values.targets[i][layer] for i in mine], dim=1)
            problem = Problem(
                part.weight,
                keys,
                targets,
                covariance=workspace.covariances.get(layer),
                memory=self.memory.get(layer),
                layer=part.name,
            )
            update = self.solver.solve(problem)
            relative = float(update.delta(part.weight).norm() / part.weight.double().norm())
            update.apply_(part.weight)
            applied.append(Applied(layer, update, relative))
            used[layer] = keys
        for layer, keys in used.items():
            past = self.memory.get(layer)
            self.memory[layer] = keys if past is None else torch.cat([past, keys], dim=1)
        return applied

    def _share(self, workspace: Workspace, plan: Plan, values: Values, layer: int, mine: list[int]) -> Tensor:
        """What this layer adds of the residual at each request's last block: (d, n)."""
        columns = []
        for i in mine:
            last = plan.layers[i][-1]
            now = block_outputs(workspace, [plan.requests[i]], [last])[last][:, 0]
            left = sum(1 for other in plan.layers[i] if other >= layer)
            columns.append((values.targets[i][last] - now) / left)
        return torch.stack(columns, dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        """The remembered keys."""
        return {f"memory.{layer}": keys for layer, keys in self.memory.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the remembered keys."""
        self.memory = {int(name.removeprefix("memory.")): keys for name, keys in state.items()}
