"""The locate-then-edit family: layers, keys, values and a closed-form solver, each a part of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lit_edit.algebra.updates import Update
from lit_edit.editors.base import Editor, Plan
from lit_edit.editors.keys import KeyAverage, MeanKey, compute_keys, context_keys
from lit_edit.editors.layers import FixedLayers, LayerPolicy
from lit_edit.editors.restraints import Restraint, UpdateKind, check_restraints
from lit_edit.editors.solvers import Solver
from lit_edit.editors.values import Plain, ValueOptimizer, ValueProblem, Values, block_outputs
from lit_edit.evaluation.scope import EditedFacts
from lit_edit.model.edited_weight import EditedWeight, Written
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest, plain
from lit_edit.threads import few_threads


class LocateThenEdit(Editor):
    """ROME, MEMIT, EMMET, AlphaEdit, MOSE and what can be put together from their parts.

    Layers of a request are worked through in ascending order, keys computed anew on the model as edited so far. Where
    values belong to each layer (``values.site: mlp``) every layer is brought to its own v*; where they belong to the
    last block (``block``), each layer takes an equal share of what is still missing there (MEMIT's spreading).

    Args:
        layers: Policy that chooses the layers a request is edited in.
        values: Optimisation of v*.
        solver: Turns keys and values into an update.
        keys: How keys are averaged over contexts.
        value_keys: The same for the keys at which v* is optimised and the residual is taken; None takes ``keys``. Only
            for solvers that can tell the two apart: ROME, whose released code takes the bare prompt's key there.
        restraints: What is done to every update, or to their sum, in this order.
        every_key: Whether to solve for the request's key in every context, each with an equal share of the weight,
            instead of their average alone. The average is what is remembered.
        with_earlier: Whether a subject that was edited before is edited together with its earlier facts: v* is
            optimised for all of them, and its key replaces theirs in the memory. Without it the memory of the first
            edit resists the second, whose key is nearly the same.
        contexts: Number of generated context prefixes.
        context_length: Length of a prefix, in tokens.

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
        every_key: bool = False,
        with_earlier: bool = False,
        contexts: int = 5,
        context_length: int = 10,
    ) -> None:
        if contexts < 0 or context_length < 1:
            raise ValueError("An editor needs contexts >= 0 and context_length >= 1.")
        layers.check(values)
        self.restraints = list(restraints or [])
        check_restraints(self.restraints, UpdateKind(type(solver).__name__, additive=solver.additive))
        for penalty in values.penalties:
            penalty.check(solver)
        if value_keys is not None and not solver.mixes_keys:
            raise ValueError(
                f"{type(solver).__name__} has one key per request and cannot take `value_keys` of their own: leave "
                "them out, or take ROME."
            )
        self.layers, self.values, self.solver, self.value_keys = layers, values, solver, value_keys
        self.keys = keys if keys is not None else MeanKey()
        if every_key and (value_keys is not None or solver.max_batch is not None):
            raise ValueError(f"{type(solver).__name__} solves for one key and cannot take `every_key`.")
        self.every_key, self.with_earlier = every_key, with_earlier
        self._contexts = (contexts, context_length)

    @property
    def max_batch(self) -> int | None:
        """As the solver says."""
        return self.solver.max_batch

    def refresh(self, workspace: Workspace) -> None:
        """Computes the remembered keys anew."""
        sites = [workspace.site(layer) for layer in self.editable_layers(workspace)]
        numbers = sorted({n for site in sites for n in site.owners if n})
        if not numbers:
            return
        place = {n: i for i, n in enumerate(numbers)}
        workspace.keys.clear()
        requests = [workspace.history[n] for n in numbers]
        found = compute_keys(workspace, requests, [site.layer for site in sites], self.keys)
        workspace.keys.clear()
        for site in sites:
            columns = [found[site.layer][:, place[n]] if n else site.keys[:, i] for i, n in enumerate(site.owners)]
            if columns:
                site.rekey(torch.stack(columns, dim=1))

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
        return super().needs_gradients or any(penalty.needs_gradient for penalty in self.values.penalties)

    def kept_size(self, d: int, p: int) -> int:
        """What the solver keeps, and that of the layer policy."""
        return self.solver.kept_size(d, p) + self.layers.kept_size(d, p)

    def describe(self) -> str:
        """The solver, and where the method departs from it."""
        values = self.values
        special = [*([] if isinstance(values.schedule, Plain) else [values.schedule]), *values.penalties]
        name = type(self.solver).__name__
        if special:
            name += f" with {', '.join(type(part).__name__ for part in special)}"
        name += "".join(f" + {type(restraint).__name__}" for restraint in self.restraints)
        if self.value_keys is not None:
            name += f", values at {type(self.value_keys).__name__}"
        if not isinstance(self.layers, FixedLayers):
            name += f", layers by {type(self.layers).__name__}"
        return name

    def check(self, workspace: Workspace, batch_size: int) -> None:
        """Refuses a batch size or a layer that the solver cannot take."""
        super().check(workspace, batch_size)
        for layer in self.editable_layers(workspace):
            self.solver.check(workspace.site(layer))

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
            counts = Counter(layer for choice in choices for layer in choice.layers)
            for layer, count in counts.items():
                workspace.site(layer).pending = count
            try:
                values = self.values.optimise(
                    workspace,
                    requests,
                    problems,
                    self.value_keys or self.keys,
                    penalties=self.values.penalties,
                    also=self._also(workspace, requests),
                )
            finally:
                for layer in counts:
                    workspace.site(layer).pending = 0
        return Plan(list(requests), [c.layers for c in choices], values.loss, values.probability, values.steps, values)

    def _also(self, workspace: Workspace, requests: Sequence[EditRequest]) -> list[list[EditRequest]]:
        """For each request the facts to keep with it: the latest about its subject, and those of its batch."""
        if not self.with_earlier:
            return [[] for _ in requests]
        found = []
        for request in requests:
            others = [r for r in requests if r is not request and plain(r.subject) == plain(request.subject)]
            about = [*workspace.earlier(request).values(), *others]
            facts = EditedFacts([*about, request])
            latest = {id(facts.latest(r)): facts.latest(r) for r in about}
            found.append([r for r in latest.values() if r is not request])
        return found

    def kept_with(self, workspace: Workspace, requests: Sequence[EditRequest]) -> list[int]:
        """The earlier edits of the same subjects, if they are kept."""
        if not self.with_earlier:
            return []
        return sorted({number for request in requests for number in workspace.earlier(request)})

    def plans(self, workspace: Workspace, requests: Sequence[EditRequest]) -> list[Plan]:
        """Values of all requests in one optimisation."""
        whole = self.plan(workspace, requests)
        values: Values = whole.data
        return [
            Plan(
                [request],
                [whole.layers[i]],
                [whole.loss[i]],
                [whole.probability[i]],
                [whole.steps[i]],
                replace(values, problems=[values.problems[i]], targets=[values.targets[i]]),
            )
            for i, request in enumerate(requests)
        ]

    @torch.no_grad()
    def apply(self, workspace: Workspace, plan: Plan) -> list[Written]:
        """Solves and writes layer by layer, then restrains the sum of all updates; the layers remember the keys."""
        watch, values = workspace.stopwatch, plan.data
        numbers = list(plan.numbered(workspace))
        solved: dict[int, tuple[list[int], Tensor, Tensor]] = {}

        def update_of(site: EditedWeight) -> Update:
            mine = [i for i, layers in enumerate(plan.layers) if site.layer in layers]
            site.forget(numbers)
            if self.with_earlier:
                site.forget([n for request in plan.requests for n in workspace.earlier(request)])
            with watch.measure("keys"):
                keys, targets, value_keys = self._problem(workspace, plan, values, site, mine)
            with watch.measure("solve"), few_threads(min(site.weight.shape)):
                if self.every_key:
                    update = self.solver.solve(site, *self._in_contexts(workspace, plan, site, mine, targets))
                else:
                    update = self.solver.solve(site, keys, targets, value_keys)
            solved[site.layer] = mine, keys, targets
            return update

        def after(site: EditedWeight, update: Update) -> None:
            mine, keys, targets = solved[site.layer]
            site.remember([numbers[i] for i in mine], keys, targets, update.rank(site.weight))
            self.solver.written(site, update)

        return self.write(workspace, plan, update_of, after)

    def _problem(
        self, workspace: Workspace, plan: Plan, values: Values, site: EditedWeight, mine: list[int]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys (p, n) and targets (d, n) of the requests edited in a layer, and value keys where they differ."""
        requests, layer = [plan.requests[i] for i in mine], site.layer
        keys = compute_keys(workspace, requests, [layer], self.keys)[layer]
        value_keys = None
        if self.value_keys is not None:
            value_keys = compute_keys(workspace, requests, [layer], self.value_keys)[layer]
        if self.values.site == "block":
            now = site.exact @ (keys if value_keys is None else value_keys)
            targets = now + self._share(workspace, plan, values, layer, mine)
        else:
            targets = torch.stack([values.targets[i][layer] for i in mine], dim=1)
        return keys, targets, value_keys

    def _in_contexts(
        self, workspace: Workspace, plan: Plan, site: EditedWeight, mine: list[int], targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys (p, c) in all contexts with their targets (d, c), scaled so that a request weighs as one key does."""
        found = context_keys(workspace, [plan.requests[i] for i in mine], site.layer)
        share = torch.cat([keys.new_full((keys.shape[1],), keys.shape[1] ** -0.5) for keys in found])
        number = torch.tensor([keys.shape[1] for keys in found], device=targets.device)
        return torch.cat(found, dim=1) * share, targets.repeat_interleave(number, dim=1) * share

    def _share(self, workspace: Workspace, plan: Plan, values: Values, layer: int, mine: list[int]) -> Tensor:
        """What this layer adds of the residual at each request's last block: (d, n)."""
        last = [plan.layers[i][-1] for i in mine]
        now = block_outputs(workspace, [plan.requests[i] for i in mine], sorted(set(last)))
        columns = []
        for column, i in enumerate(mine):
            left = sum(1 for other in plan.layers[i] if other >= layer)
            columns.append((values.targets[i][last[column]] - now[last[column]][:, column]) / left)
        return torch.stack(columns, dim=1)
