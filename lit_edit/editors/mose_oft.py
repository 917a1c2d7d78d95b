"""MOSE-OFT: what the first release of MOSE's code did, orthogonal fine-tuning on the input side, under its own name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_edit.algebra.updates import Rotation
from lit_edit.editors.base import Editor, Plan
from lit_edit.editors.restraints import Restraint, UpdateKind, check_restraints
from lit_edit.model.edited_weight import Written
from lit_edit.model.trial import edit_batch, logits_with, target_nll, target_probability
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest


def cayley(parameters: Tensor) -> Tensor:
    r"""``Q = (I − A)(I + A)⁻¹`` with the skew-symmetric ``A = (X − Xᵀ) / 2``; orthogonal, and ``I`` for ``X = 0``.

    Args:
        parameters: ``X (..., b, b)``, any square matrices.

    Returns:
        (..., b, b) in the dtype given, differentiable. ``I + A`` is never singular: A's eigenvalues are imaginary.
    """
    skew = (parameters - parameters.mT) / 2
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    # The two factors commute, so the inverse may stand on either side.
    return torch.linalg.solve(eye + skew, eye - skew)


class MoseOFT(Editor):
    """``W ← W B`` with ``B = blockdiag(cayley(X_1), …, cayley(X_b))``, the ``X_i`` trained from zero by Adam.

    This is not the method of the paper (Xu et al. 2026, MOSE), which multiplies on the left with the solution of a
    Procrustes problem and is `lit_edit.editors.solvers.MOSE`. It is what the paper's code did when first released:
    orthogonal
    fine-tuning (OFT, Qiu et al. 2023) of the down-projections of fixed layers on the target's negative log-likelihood
    under the edit prompt, without keys, values, preserved knowledge or a choice of layers. Singular values stay as they
    are all the same.

    Args:
        layers: Layers whose down-projections are turned.
        blocks: Number of blocks on the diagonal of ``B``; it must divide the projection's input size.
        lr: Adam's learning rate.
        steps: Number of Adam steps; all are taken.
        radius: ``ε`` of constrained OFT: before every forward pass each ``X_i (b, b)`` is shortened to
            ``‖X_i‖_F ≤ ε b² / √blocks``, as released (1e-5). It binds on narrow models only. None leaves it out.
        restraints: Must be empty: a restrained rotation is no rotation.

    Raises:
        ValueError: for numbers out of range, or if there are restraints.
    """

    def __init__(
        self,
        layers: list[int],
        blocks: int = 4,
        lr: float = 5e-4,
        steps: int = 25,
        radius: float | None = 1e-5,
        restraints: list[Restraint] | None = None,
    ) -> None:
        check_restraints(restraints or [], UpdateKind(type(self).__name__, additive=False))
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"MOSE-OFT needs distinct layers and at least one, not {layers}.")
        if not (blocks >= 1 and lr > 0 and steps >= 1):
            raise ValueError(f"MOSE-OFT needs blocks >= 1, lr > 0 and steps >= 1, not {blocks}, {lr} and {steps}.")
        if radius is not None and not radius > 0:
            raise ValueError(f"The radius must be positive, not {radius}; null leaves it out.")
        self.layers, self.blocks, self.lr, self.steps, self.radius = sorted(layers), blocks, lr, steps, radius

    def editable_layers(self, workspace: Workspace) -> list[int]:
        """The layers themselves.

        Raises:
            ValueError: if the blocks do not divide a layer's input size.
        """
        workspace.architecture.check(self.layers)
        for layer in self.layers:
            p = workspace.architecture[layer].weight.shape[1]
            if p % self.blocks:
                raise ValueError(
                    f"{self.blocks} blocks do not divide the {p} inputs of layer {layer}'s down-projection: choose a "
                    "divisor."
                )
        return list(self.layers)

    def plan(self, workspace: Workspace, requests: Sequence[EditRequest]) -> Plan:
        """Trains the blocks' parameters; the plan's data are these, (blocks, b, b) by layer."""
        with workspace.stopwatch.measure("values"):
            return self._train(workspace, requests)

    def _train(self, workspace: Workspace, requests: Sequence[EditRequest]) -> Plan:
        batch = edit_batch(workspace, requests)
        weights, free = {}, {}
        for layer in self.layers:
            weight = workspace.architecture[layer].weight
            weights[layer] = weight.to(torch.promote_types(weight.dtype, torch.float32))
            size = weight.shape[1] // self.blocks
            free[layer] = weights[layer].new_zeros(self.blocks, size, size).requires_grad_()
        adam = torch.optim.Adam(list(free.values()), lr=self.lr)
        for step in range(self.steps + 1):  # the last turn only evaluates
            with torch.set_grad_enabled(step < self.steps):
                turned = {layer: _turned(weights[layer], cayley(x)) for layer, x in free.items()}
                logits = logits_with(workspace, batch, turned)
                losses = target_nll(logits, batch.labels)
            if step == self.steps:
                break
            # Not `backward`, which would leave gradients on weights of the model that require them.
            for x, gradient in zip(free.values(), torch.autograd.grad(losses.mean(), list(free.values())), strict=True):
                x.grad = gradient
            adam.step()
            if self.radius is not None:
                for x in free.values():
                    _shorten_(x, self.radius)
        n = len(requests)
        chances = target_probability(logits, batch.labels)
        data = {layer: x.detach() for layer, x in free.items()}
        return Plan(list(requests), [tuple(self.layers)] * n, losses.tolist(), chances, [self.steps] * n, data)

    def apply(self, workspace: Workspace, plan: Plan) -> list[Written]:
        """Turns the weights; the Cayley map is computed anew in float64."""
        return self.write(workspace, plan, lambda site: Rotation(cayley(plan.data[site.layer].double()), of_keys=True))


def _turned(weight: Tensor, blocks: Tensor) -> Tensor:
    """``W blockdiag(blocks)`` without the zeros: (d, p) and (n, b, b) to (d, p)."""
    n, b, _ = blocks.shape
    return (weight.reshape(-1, n, b).transpose(0, 1) @ blocks).transpose(0, 1).reshape(weight.shape)


@torch.no_grad()
def _shorten_(parameters: Tensor, radius: float) -> None:
    """Brings each block back to the Frobenius norm that constrained OFT allows."""
    n, b, _ = parameters.shape
    limit = radius * b**2 / n**0.5
    norm = torch.linalg.matrix_norm(parameters, keepdim=True)
    parameters.mul_((limit / norm.clamp_min(torch.finfo(parameters.dtype).tiny)).clamp_max(1.0))
