"""The locate-then-edit family: layers, keys, values and a closed-form solver, each a part of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_edit.algebra.exact import ExactWeight
from lit_edit.algebra.updates import Update
from lit_edit.editors.base import Applied, Editor, Plan
from lit_edit.editors.keys import KeyAverage, MeanKey, compute_keys
from lit_edit.editors.layers import LayerPolicy
from lit_edit.editors.restraints import Restraint, Source
from lit_edit.editors.solvers import Problem, Solver
from lit_edit.editors.values import ValueOptimizer, ValueProblem, Values, block_outputs
from lit_edit.editors.writing import RestrainedWriting
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest


class LocateThenEdit(Editor):
    """ROME, MEMIT, EMMET, AlphaEdit, MOSE and what can be put together from their parts.

    Layers of a request are worked through in ascending order, keys computed anew on the model as edited so far. Where
    values belong to each layer (``values.site: mlp``) every layer is brought to its own v*; where they belong to the
    last block (``block``), each layer takes an equal share of what is still missing there (MEMIT's spreading).

    Args:
        layers: which layers a request is edited in.
        values: the optimisation of v*.
        solver: from keys and values to an update.
        keys: how keys are averaged over contexts.
        value_keys: the same for the keys at which v* is optimised and the residual is taken; None takes ``keys``. Only
            for solvers that can tell the two apart: ROME, whose released code takes the bare prompt's key there.
        restraints: what is done to every update, or to their sum, in this order.
        contexts: number of generated context prefixes.
        context_length: their length in tokens.
        carry_rounding: whether what rounding takes of a weight of 16 bits is kept, in as much memory again, and
            counted with the weight at the next edit (`lit_edit.editors.remainders.Remainders`).

    Raises:
        ValueError: if the parts do not go together; the message says why.
    """

    def __init__(
        self,
        layers: LayerPolicy,
        values: ValueOptimizer,
        solver: Solver,
        keys: KeyAverage | None = None,
        value_keys: KeyAverage | None = None,
        restraints: list[Restraint] | None = None,
        contexts: int = 5,
        context_length: int = 10,
        carry_rounding: bool = True,
    ) -> None:
        if contexts < 0 or context_length < 1:
            raise ValueError("An editor needs contexts >= 0 and context_length >= 1.")
        layers.check(values)
        source = Source(type(solver).__name__, additive=solver.additive)
        self.writing = RestrainedWriting(restraints, source, carry_rounding)
        self.restraints = self.writing.restraints
        for penalty in values.penalties:
            penalty.check(solver)
        if value_keys is not None and not solver.mixes_keys:
            raise ValueError(
                f"{type(solver).__name__} has one key per request and cannot take `value_keys` of their own: leave "
                "them out, or take ROME."
            )
        self.layers, self.values, self.solver, self.value_keys = layers, values, solver, value_keys
        self.keys = keys if keys is not None else MeanKey()
        self._contexts = (contexts, context_length)
        self.memory: dict[int, Tensor] = {}  # per layer (p, m): keys of past edits

    @property
    def context_sampling(self) -> tuple[int, int]:
        """(number, length) of generated prefixes."""
        return self._contexts

    @property
    def needs_covariances(self) -> bool:
        """As the solver or the layer policy says."""
        return self.solver.needs_covariance or self.layers.needs_covariance

    @property
    def needs_gradients(self) -> bool:
        """As the restraints and the values' penalties say."""
        return self.writing.needs_gradients or any(penalty.needs_gradient for penalty in self.values.penalties)

    @property
    def needs_originals(self) -> bool:
        """As the restraints and the values' penalties say."""
        return self.writing.needs_originals or any(penalty.needs_original for penalty in self.values.penalties)

    @property
    def carries_rounding(self) -> bool:
        """As asked for."""
        return self.writing.remainders.on

    def check(self, workspace: Workspace, batch_size: int) -> None:
        """Refuses a batch size or a covariance that the solver cannot take."""
        self.solver.check_batch_size(batch_size)
        if not self.solver.needs_covariance:
            return
        for layer, covariance in workspace.covariances.items():
            part = workspace.architecture[layer]
            self.solver.check_covariance(covariance, part.name, part.weight.device)

    def editable_layers(self, workspace: Workspace) -> list[int]:
        """As the layer policy says."""
        return self.layers.candidates(workspace.architecture)

    def plan(self, workspace: Workspace, requests: Sequence[EditRequest]) -> Plan:
        """Chooses layers and optimises v*, all requests of the batch together."""
        workspace.keys.clear()
        with workspace.stopwatch.measure("layers"):
            choices = self.layers.choose(workspace, requests, self.values, self.keys, self.value_keys)
        at_block = self.values.site == "block"
        problems = [ValueProblem(i, c.layers[-1:] if at_block else c.layers) for i, c in enumerate(choices)]
        with workspace.stopwatch.measure("values"):
            grounds = None
            if self.values.penalties:
                here = Counter(layer for choice in choices for layer in choice.layers)
                grounds = {
                    layer: self.writing.ground(workspace, layer, len(requests), here[layer])
                    for layer in sorted({layer for problem in problems for layer in problem.layers})
                }
            values = self.values.optimise(workspace, requests, problems, self.value_keys or self.keys, grounds=grounds)
        return Plan(list(requests), [c.layers for c in choices], values.loss, values.probability, values.steps, values)

    @torch.no_grad()
    def apply(self, workspace: Workspace, plan: Plan) -> list[Applied]:
        """Solves and applies layer by layer, then restrains the sum of all updates; remembers the keys."""
        watch = workspace.stopwatch
        memory: dict[int, Tensor] = {}

        def solved(layer: int) -> Update:
            mine = [i for i, layers in enumerate(plan.layers) if layer in layers]
            with watch.measure("keys"):
                problem, keys = self._problem(workspace, plan, plan.data, layer, mine)
            with watch.measure("solve"):
                update = self.solver.solve(problem)
            past = self.memory.get(layer)
            memory[layer] = keys if past is None else torch.cat([past, keys], dim=1)
            return update

        carried = self.solver.state_dict()
        try:
            applied = self.writing.apply(workspace, plan, self.editable_layers(workspace), solved)
        except BaseException:  # what it has solved was not written
            self.solver.load_state_dict(carried)
            raise
        self.memory |= memory
        return applied

    @torch.no_grad()
    def finish(self, workspace: Workspace) -> list[Applied]:
        """What restraints do once, at the end."""
        return self.writing.finish(workspace, self.editable_layers(workspace))

    def _problem(
        self, workspace: Workspace, plan: Plan, values: Values, layer: int, mine: list[int]
    ) -> tuple[Problem, Tensor]:
        """What to solve in a layer for the requests that are edited there, and their keys (p, n)."""
        requests = [plan.requests[i] for i in mine]
        keys = compute_keys(workspace, requests, [layer], self.keys)[layer]
        value_keys = None
        if self.value_keys is not None:
            value_keys = compute_keys(workspace, requests, [layer], self.value_keys)[layer]
        part = workspace.architecture[layer]
        remainder = self.writing.remainders.of(layer, part.weight)
        if self.values.site == "block":
            now = ExactWeight(part.weight, remainder) @ (keys if value_keys is None else value_keys)
            targets = now + self._share(workspace, plan, values, layer, mine)
        else:
            targets = torch.stack([values.targets[i][layer] for i in mine], dim=1)
        problem = Problem(
            part.weight,
            keys,
            targets,
            covariance=workspace.covariances.get(layer) if self.solver.needs_covariance else None,
            memory=self.memory.get(layer),
            layer=part.name,
            value_keys=value_keys,
            remainder=remainder,
        )
        return problem, keys

    def _share(self, workspace: Workspace, plan: Plan, values: Values, layer: int, mine: list[int]) -> Tensor:
        """What this layer adds of the residual at each request's last block: (d, n)."""
        last = [plan.layers[i][-1] for i in mine]
        now = block_outputs(workspace, [plan.requests[i] for i in mine], sorted(set(last)))
        columns = []
        for column, i in enumerate(mine):
            left = sum(1 for other in plan.layers[i] if other >= layer)
            columns.append((values.targets[i][last[column]] - now[last[column]][:, column]) / left)
        return torch.stack(columns, dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        """The remembered keys, how many requests were applied (`RestrainedWriting.state_dict`), the solver's own."""
        memory = {f"memory.{layer}": keys for layer, keys in self.memory.items()}
        own = {f"solver.{name}": tensor for name, tensor in self.solver.state_dict().items()}
        return self.writing.state_dict() | memory | own

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave."""
        self.writing.load_state_dict(state)
        self.memory = {
            int(name.removeprefix("memory.")): keys for name, keys in state.items() if name.startswith("memory.")
        }
        own = {name.removeprefix("solver."): t for name, t in state.items() if name.startswith("solver.")}
        self.solver.load_state_dict(own)
