"""A control without facts: random changes of a chosen size, orthogonal or additive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_edit.algebra.updates import Additive, Rotation, Update
from lit_edit.editors.base import Editor, Plan
from lit_edit.editors.restraints.controls import generator
from lit_edit.model.edited_weight import EditedWeight, Written
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest

Form = Literal["orthogonal", "additive"]


class RandomChange(Editor):
    r"""Changes weights at random instead of writing facts (MOSE, Eq. 4 and Fig. 2).

    .. math:: W_i = R_i W_{i-1} \qquad \text{or} \qquad W_i = W_{i-1} + Δ_i

    with random orthogonal ``R_i`` or Gaussian ``Δ_i`` of equal size, ``‖ΔW‖_F = size · ‖W_0‖_F``. What becomes of norm,
    condition number and abilities is then the form's doing alone. No value is optimised: requests only count the edits.

    A rotation of a given size turns all of ``d`` random directions, in pairs, by the same angle: with
    ``R = cos θ · I + sin θ · J`` and a random antisymmetric orthogonal ``J``, ``‖(R − I) W‖_F = 2 sin(θ / 2) ‖W‖_F``
    whatever ``W`` is, but for one direction that stays where ``d`` is odd. Without a size ``R_i`` is drawn from all
    orthogonal matrices alike, as in the paper, which moves a weight by about ``√2`` of its norm.

    Args:
        layers: Layers to change, with every batch.
        form: ``orthogonal`` or ``additive``.
        size: Relative size of the change of every batch, above 0 and at most 1.9; None for a rotation by any matrix,
            and an additive change of ``√2``.
        seed: Seed of the changes; another change for every layer and count of edits.

    Raises:
        ValueError: For an unknown form, a size out of range, or layers that are not distinct.
    """

    def __init__(self, layers: list[int], form: Form = "orthogonal", size: float | None = 0.1, seed: int = 0) -> None:
        if form not in get_args(Form):
            raise ValueError(f"The form of a random change is {' or '.join(get_args(Form))}, not {form!r}.")
        if size is not None and not 0 < size <= 1.9:
            raise ValueError(f"The size of a random change is above 0 and at most 1.9, not {size}.")
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"A random change needs distinct layers and at least one, not {layers}.")
        self.layers, self.form, self.size, self.seed = sorted(layers), form, size, seed

    def describe(self) -> str:
        """``random orthogonal change``."""
        return f"random {self.form} change"

    def editable_layers(self, workspace: Workspace) -> list[int]:
        """The layers themselves."""
        workspace.architecture.check(self.layers)
        return list(self.layers)

    def plan(self, workspace: Workspace, requests: Sequence[EditRequest]) -> Plan:
        """Nothing to optimise: loss, probability and steps are 0."""
        n = len(requests)
        return Plan(list(requests), [tuple(self.layers)] * n, [0.0] * n, [0.0] * n, [0] * n)

    def apply(self, workspace: Workspace, plan: Plan) -> list[Written]:
        """One change of each layer for the batch."""
        return self.write(workspace, plan, self.change)

    def change(self, site: EditedWeight) -> Update:
        """The next change of a layer."""
        drawn = generator(self.seed, site.layer, site.edits)
        d, p = site.shape
        if self.form == "additive":
            noise = torch.randn(d, p, generator=drawn, dtype=torch.float64)
            wanted = (math.sqrt(2) if self.size is None else self.size) * float(site.original.double().norm())
            return Additive((noise * (wanted / float(noise.norm()))).to(site.device))
        basis = orthogonal(d, drawn)
        if self.size is None:
            return Rotation(basis.to(site.device))
        return Rotation(turned(basis, site.exact.dense().cpu(), self.size).to(site.device))


def orthogonal(d: int, drawn: torch.Generator) -> Tensor:
    """``(d, d)`` in float64, from all orthogonal matrices alike (Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(d, d, generator=drawn, dtype=torch.float64))
    return q * r.diagonal().sign()


def turned(basis: Tensor, weight: Tensor, size: float) -> Tensor:
    """``R (d, d)``: pairs of directions turned by the same angle, so that ``‖(R − I) W‖_F = size · ‖W‖_F``.

    Args:
        basis: ``(d, d)``, orthogonal; columns 0 and 1, 2 and 3, and so on span the planes.
        weight: ``W (d, p)`` in float64.
        size: As above.

    Raises:
        ValueError: If the one direction that stays, for an odd ``d``, leaves too little of the weight to turn.
    """
    d = len(basis)
    even = d - d % 2
    moving = float((basis[:, :even].T @ weight).norm() / weight.norm())
    if size > 2 * moving:
        raise ValueError(f"No rotation moves this weight by {size} of its norm.")
    angle = 2 * math.asin(size / (2 * moving))
    first, second = basis[:, 0:even:2], basis[:, 1:even:2]
    plane = first @ first.T + second @ second.T
    turn = second @ first.T - first @ second.T
    return torch.eye(d, dtype=torch.float64) + (math.cos(angle) - 1) * plane + math.sin(angle) * turn
