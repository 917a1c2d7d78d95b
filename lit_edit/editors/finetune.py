"""Fine-tuning of the down-projections of a few layers: FT, FT-L, FT-M and FT with an elastic net."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_edit.algebra.updates import Additive
from lit_edit.editors.base import Editor, Plan
from lit_edit.editors.restraints import Restraint, UpdateKind, check_restraints
from lit_edit.editors.values import ElasticNet
from lit_edit.model.edited_weight import Written
from lit_edit.model.trial import edit_batch, last_token_nll, logits_with, target_nll, target_probability
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest


class FineTune(Editor):
    """Adam on the weights themselves, all requests of a batch and all layers together.

    The loss is the mean over requests of the target's negative log-likelihood, itself the mean over the target's
    tokens. The literature's names for fine-tuning are settings of this one class:

    * FT (Meng et al. 2022, ROME's baseline): no clamp, ``objective: last_token``.
    * FT-L (FT+L of the same paper, after Zhu et al. 2020): ``norm_constraint``, ``objective: last_token``.
    * FT-M (Zhang et al. 2024, "A Comprehensive Study of Knowledge Editing for Large Language Models"): no clamp,
      ``objective: target_tokens``.
    * FT with an elastic net (Xu et al. 2025, EAC, Appendix E): ``elastic_net`` on the change of the weight.

    Args:
        layers: Layers whose down-projections are trained.
        lr: Adam's learning rate.
        steps: Largest number of steps.
        stop_loss: Training ends, or does not start, once the requests' mean loss is below; the penalty does not count.
        objective: ``last_token``: every token of the target is predicted from the prompt's last token, as ROME's
            released baseline does; ``target_tokens``: each token from what stands before it (teacher forcing).
        norm_constraint: After each step no entry of a weight is farther than this from where it was before the batch;
            None leaves it free.
        elastic_net: A penalty on the change of each weight since before the batch; None leaves it out.
        weight_decay: Adam's (an L2 term on the weight, not on its change).
        restraints: What is done to every update of a weight, or to the sum of them, in this order. The updates are of
            full rank.

    Raises:
        ValueError: for numbers out of range, an unknown objective, or restraints that do not work on such updates.
    """

    def __init__(
        self,
        layers: list[int],
        lr: float = 5e-4,
        steps: int = 25,
        stop_loss: float = 1e-2,
        objective: Literal["last_token", "target_tokens"] = "last_token",
        norm_constraint: float | None = None,
        elastic_net: ElasticNet | None = None,
        weight_decay: float = 0.0,
        restraints: list[Restraint] | None = None,
    ) -> None:
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"Fine-tuning needs distinct layers and at least one, not {layers}.")
        if not (lr > 0 and steps >= 1 and weight_decay >= 0):
            raise ValueError(
                f"Fine-tuning needs lr > 0, steps >= 1 and weight_decay >= 0, not {lr}, {steps} and {weight_decay}."
            )
        if objective not in ("last_token", "target_tokens"):
            raise ValueError(f"The objective is 'last_token' or 'target_tokens', not {objective!r}.")
        if norm_constraint is not None and not norm_constraint > 0:
            raise ValueError(f"The norm constraint must be positive, not {norm_constraint}; null leaves it out.")
        self.layers, self.lr, self.steps, self.stop_loss = sorted(layers), lr, steps, stop_loss
        self.objective, self.norm_constraint = objective, norm_constraint
        self.elastic_net, self.weight_decay = elastic_net, weight_decay
        self.restraints = list(restraints or [])
        check_restraints(self.restraints, UpdateKind(type(self).__name__, dense=True))

    def editable_layers(self, workspace: Workspace) -> list[int]:
        """The layers themselves."""
        workspace.architecture.check(self.layers)
        return list(self.layers)

    def kept_size(self, d: int, p: int) -> int:
        """Weight, gradient and Adam's moments of a trained copy, in float32."""
        return 2 * d * p

    def plan(self, workspace: Workspace, requests: Sequence[EditRequest]) -> Plan:
        """Trains copies of the weights; the plan's data are their changes (d, p) by layer."""
        with workspace.stopwatch.measure("values"):
            return self._train(workspace, requests)

    def _train(self, workspace: Workspace, requests: Sequence[EditRequest]) -> Plan:
        batch = edit_batch(workspace, requests)
        before = {layer: _working_copy(workspace.architecture[layer].weight) for layer in self.layers}
        free = {layer: weight.clone().requires_grad_() for layer, weight in before.items()}
        adam = torch.optim.Adam(list(free.values()), lr=self.lr, weight_decay=self.weight_decay)
        nll = last_token_nll if self.objective == "last_token" else target_nll
        taken = 0
        while True:  # the last turn only evaluates, so that the reported loss is the new weights' own
            with torch.set_grad_enabled(taken < self.steps):
                logits = logits_with(workspace, batch, free)
                losses = nll(logits, batch.labels)
                loss = losses.mean()
            if taken == self.steps or float(loss.detach()) < self.stop_loss:
                break
            if self.elastic_net is not None:
                for layer, weight in free.items():
                    loss = loss + self.elastic_net((weight - before[layer]).flatten())
            # Not `backward`, which would leave gradients on weights of the model that require them.
            for weight, gradient in zip(free.values(), torch.autograd.grad(loss, list(free.values())), strict=True):
                weight.grad = gradient
            adam.step()
            taken += 1
            if self.norm_constraint is not None:
                with torch.no_grad():
                    for layer, weight in free.items():
                        bound = self.norm_constraint
                        weight.copy_(weight.clamp(before[layer] - bound, before[layer] + bound))
        n = len(requests)
        changes = {layer: (weight - before[layer]).detach() for layer, weight in free.items()}
        chances = target_probability(logits.detach(), batch.labels)
        return Plan(list(requests), [tuple(self.layers)] * n, losses.tolist(), chances, [taken] * n, changes)

    def apply(self, workspace: Workspace, plan: Plan) -> list[Written]:
        """Adds the changes to the weights, restrained."""
        return self.write(workspace, plan, lambda site: Additive(plan.data[site.layer]))


def _working_copy(weight: Tensor) -> Tensor:
    """In float32 at least: Adam's steps are lost in a half-precision weight's rounding."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).clone()
