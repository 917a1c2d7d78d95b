"""What an editor is: from edit requests to weight updates, in two halves as Lightning calls them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lit_edit.algebra.updates import Update
from lit_edit.editors.restraints import Restraint
from lit_edit.evaluation.evaluate import Outcome, Reference, evaluate
from lit_edit.model.edited_weight import EditedWeight, Written
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest
from lit_edit.settings import Configured


@dataclass(frozen=True)
class Plan:
    """What the gradient half found.

    Attributes:
        requests: The batch.
        layers: Per request, those it is written into.
        loss: Per request, that of its values when their optimisation stopped.
        probability: Per request, of the new target with the values in place.
        steps: Per request, of the optimisation.
        data: The editor's own.
        numbers: Per request, the number of the edit. Those already in the weights are written again, their old keys
            replaced. None for new edits, numbered in order.
    """

    requests: list[EditRequest]
    layers: list[tuple[int, ...]]
    loss: list[float]
    probability: list[float]
    steps: list[int]
    data: Any = field(default=None, repr=False)
    numbers: list[int] | None = None

    def numbered(self, workspace: Workspace) -> dict[int, EditRequest]:
        """The requests by number of the edit."""
        first = workspace.last_number + 1
        numbers = range(first, first + len(self.requests)) if self.numbers is None else self.numbers
        return dict(zip(numbers, self.requests, strict=True))

    @property
    def counts(self) -> dict[int, int]:
        """Requests by layer, ascending."""
        counts = Counter(layer for layers in self.layers for layer in layers)
        return dict(sorted(counts.items()))


class Editor(Configured, ABC):
    """Turns a batch of requests into weight updates.

    `plan` is the gradient half (run by ``training_step``), `apply` the closed-form half (``on_train_batch_end``). An
    editor holds settings only: what edits leave behind lies in the workspace's `EditedWeight`.

    Attributes:
        restraints: What is done to updates, or to their sum; editors whose updates are not added have none.
    """

    restraints: Sequence[Restraint] = ()

    @property
    def max_batch(self) -> int | None:
        """Requests that can be written together at most; None for any number."""
        return None

    @abstractmethod
    def editable_layers(self, workspace: Workspace) -> list[int]:
        """Every layer that edits may touch.

        Raises:
            ValueError: If a layer was asked for that the model does not have.
        """

    @property
    def needs_covariances(self) -> bool:
        """Whether editable layers must come with their key covariance."""
        return False

    @property
    def needs_gradients(self) -> bool:
        """Whether editable layers must come with their gradient statistic."""
        return any(restraint.needs_gradient for restraint in self.restraints)

    @property
    def finishes(self) -> bool:
        """Whether `finish` has anything to do."""
        return any(type(restraint).finish is not Restraint.finish for restraint in self.restraints)

    @property
    def context_sampling(self) -> tuple[int, int]:
        """(number, length in tokens) of generated context prefixes; (0, 0) for none."""
        return (0, 0)

    def refresh(self, workspace: Workspace) -> None:
        """Computes what layers remember of past edits anew, on the model as it is."""

    def describe(self) -> str:
        """The method in a few words, for people: ``MEMIT with EAC + PRUNE``."""
        return type(self).__name__ + "".join(f" + {type(restraint).__name__}" for restraint in self.restraints)

    def kept_size(self, d: int, p: int) -> int:
        """Float64 numbers kept between edits for a layer with ``W (d, p)``; for estimates of memory."""
        return 0

    def check(self, workspace: Workspace, batch_size: int) -> None:
        """Finds what will not work before the first edit; the workspace is complete by then.

        Raises:
            ValueError: If batches of this size cannot be edited, or the statistics do not serve.
        """
        if self.max_batch is not None and batch_size > self.max_batch:
            raise ValueError(
                f"{self.describe()} writes one fact at a time and got {batch_size} in a batch: set batch_size to 1, or "
                "use MEMIT."
            )

    @abstractmethod
    def plan(self, workspace: Workspace, requests: Sequence[EditRequest]) -> Plan:
        """The gradient half. Needs gradients enabled; does not change the model."""

    def plans(self, workspace: Workspace, requests: Sequence[EditRequest]) -> list[Plan]:
        """A plan for each request as if it were written alone; where possible all are found together."""
        return [self.plan(workspace, [request]) for request in requests]

    def single_edits(
        self, workspace: Workspace, requests: Sequence[EditRequest], reference: Reference | None = None
    ) -> Iterator[tuple[Plan, Outcome]]:
        """Each request written alone, judged, and taken back bit by bit: what the method does to a fresh model.

        Args:
            workspace: Of the unedited model, with the statistics that the method needs.
            requests: Facts to write.
            reference: The unedited model's answers, if they were collected before.

        Raises:
            ValueError: After edits, which would be taken back with it.
        """
        if workspace.edits:
            raise ValueError("Single edits start from an unedited model: open a new session.")
        model, prompter = workspace.model, workspace.prompter
        known = Reference() if reference is None else reference
        known.collect(model, prompter, requests)
        with torch.enable_grad():
            plans = self.plans(workspace, requests)
        for plan in plans:
            try:
                self.apply(workspace, plan)
                yield plan, evaluate(model, prompter, plan.requests, known)[0]
            finally:
                for site in workspace.sites.values():
                    site.restore()
                workspace.history.clear()
                workspace.last_number = 0

    def kept_with(self, workspace: Workspace, requests: Sequence[EditRequest]) -> list[int]:
        """Numbers of earlier edits that are written again together with a batch, to be asked before it is applied."""
        return []

    @abstractmethod
    def apply(self, workspace: Workspace, plan: Plan) -> list[Written]:
        """The closed-form half: changes the weights and says how. Where it ends in an error, nothing has changed."""

    @torch.no_grad()
    def write(
        self,
        workspace: Workspace,
        plan: Plan,
        update_of: Callable[[EditedWeight], Update],
        after: Callable[[EditedWeight, Update], None] | None = None,
    ) -> list[Written]:
        """Writes the updates of a batch layer by layer, ascending, then lets the restraints work on their sums.

        Args:
            workspace: The model.
            plan: Says which requests go into which layers.
            update_of: Gives a layer's update; asked when the layers below are written.
            after: Told of every update as it was written, to note what is remembered of it; counts requests if None.

        Returns:
            What was written, the updates first.
        """
        watch, counts = workspace.stopwatch, plan.counts
        sites = [workspace.site(layer) for layer in self.editable_layers(workspace)]
        written: list[Written] = []
        with workspace.all_or_nothing():
            for site in sites:
                site.pending = counts.get(site.layer, 0)
            try:
                for layer in counts:
                    site = workspace.site(layer)
                    update = update_of(site)
                    with watch.measure("restrain"):
                        for restraint in self.restraints:
                            update = restraint.restrain(update, site)
                    with watch.measure("write"):
                        written.append(replace(site.write(update), requests=site.pending))
                    if after is None:
                        site.count(site.pending, update.rank(site.weight))
                    else:
                        after(site, update)
                    site.pending = 0
                before = workspace.edits
                workspace.note(plan.numbered(workspace))
                with watch.measure("restrain"):
                    for site in sites:
                        for restraint in self.restraints:
                            further = restraint.total(site, before, workspace.edits)
                            if further is not None:
                                written.append(site.write(further))
            finally:
                for site in sites:
                    site.pending = 0
        return written

    @torch.no_grad()
    def finish(self, workspace: Workspace) -> list[Written]:
        """What remains to be done to the weights when no more edits follow. A second call in a row does nothing."""
        if workspace.finished_at == workspace.edits:
            return []
        sites = [workspace.site(layer) for layer in self.editable_layers(workspace)]
        written = []
        with workspace.all_or_nothing():
            for site in sites:
                for restraint in self.restraints:
                    further = restraint.finish(site)
                    if further is not None:
                        written.append(site.write(further))
        workspace.finished_at = workspace.edits
        return written
