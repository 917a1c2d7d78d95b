"""A layer as solvers, restraints and penalties see it, without a model; random edits of one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_edit.algebra.updates import Update
from lit_edit.editors.solvers import Solver
from lit_edit.model.edited_weight import EditedWeight, Written


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(*shape: int, seed: int = 0) -> Tensor:
    """Orthonormal columns."""
    return torch.linalg.qr(normal(*shape, seed=seed)).Q


def site_of(
    weight: Tensor,
    covariance: Tensor | None = None,
    memory: Tensor | None = None,
    gradient: Tensor | None = None,
    original: Tensor | None = None,
    transposed: bool = False,
    layer: int = 3,
) -> EditedWeight:
    """A layer on a copy of a weight (d, p).

    Args:
        weight: As above.
        covariance: (p, p).
        memory: Keys of past edits, (p, m), numbered from 1.
        gradient: (d, p).
        original: The weight before the first edit, where that is not the weight itself.
        transposed: Store it as a model does that keeps (p, d).
        layer: Index of the block, which is called ``h.<layer>``.
    """

    def stored(matrix: Tensor) -> Tensor:
        return (matrix.T if transposed else matrix).clone(memory_format=torch.contiguous_format)

    site = EditedWeight(stored(weight if original is None else original), f"h.{layer}", layer, transposed)
    if original is not None:
        site.replace(stored(weight))
    site.covariance, site.gradient = covariance, gradient
    if memory is not None:
        m = memory.shape[1]
        site.remember(range(1, m + 1), memory, torch.zeros(len(weight), m))
    return site


def edited_site(edits: int = 3, pending: int = 1, d: int = 16, p: int = 24, seed: int = 0) -> EditedWeight:
    """A layer with a gradient, in which edits of rank one were written and some more are about to be."""
    original, total = normal(d, p, seed=seed), normal(d, edits, seed=seed + 1) @ normal(edits, p, seed=seed + 2)
    gradient = normal(d, p, seed=seed + 3)
    site = site_of(original + total, gradient=gradient, original=original, layer=seed)
    site.count(edits)
    site.pending = pending
    return site


@dataclass(frozen=True)
class Case:
    """A layer, and keys and targets to edit it with."""

    site: EditedWeight
    keys: Tensor
    targets: Tensor
    value_keys: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """All of it, (d, p) in float64."""
        return self.site.exact.dense()

    @property
    def covariance(self) -> Tensor:
        assert self.site.covariance is not None
        return self.site.covariance

    @property
    def memory(self) -> Tensor:
        return self.site.keys.double()

    @property
    def residual(self) -> Tensor:
        return self.targets - self.weight @ self.keys

    def solve(self, solver: Solver) -> Update:
        return solver.solve(self.site, self.keys, self.targets, self.value_keys)

    def delta(self, solver: Solver) -> Tensor:
        """The solver's change of the weight, (d, p)."""
        return self.solve(solver).delta(self.weight)

    def write(self, solver: Solver) -> Written:
        """Solves, writes and remembers, as an editor does."""
        written, number = self.site.write(self.solve(solver)), self.site.edits + 1
        self.site.remember(range(number, number + self.keys.shape[1]), self.keys, self.targets)
        solver.written(self.site, written.update)
        return written

    def then(self, seed: int, n: int | None = None) -> Case:
        """Another edit of the layer: keys as in its corpus, targets as long as the present outputs."""
        (d, p), n = self.site.shape, self.keys.shape[1] if n is None else n
        keys = torch.linalg.cholesky(self.covariance.double()) @ normal(p, n, seed=seed)
        targets = normal(d, n, seed=seed + 1000)
        return replace(self, keys=keys, targets=targets / targets.norm(dim=0) * (self.weight @ keys).norm(dim=0))

    def fresh(self, **changes: Any) -> Case:
        """The same on a layer of its own that was never edited, but for what is changed."""
        parts = {"keys": self.keys, "targets": self.targets, "value_keys": self.value_keys}
        layer = {"weight": self.weight, "covariance": self.site.covariance, "memory": self.memory}
        return case_of(**(layer | parts | changes))


def case_of(
    weight: Tensor,
    keys: Tensor,
    targets: Tensor,
    covariance: Tensor | None = None,
    memory: Tensor | None = None,
    value_keys: Tensor | None = None,
) -> Case:
    return Case(site_of(weight, covariance, memory), keys, targets, value_keys)


def random_case(d: int = 16, p: int = 48, n: int = 1, m: int = 0, *, seed: int = 0, **changes: Any) -> Case:
    """An edit of a random layer, with a covariance whose spectrum decays as a real one's does."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root = torch.linalg.qr(draw(p, p)).Q * (2.0 / torch.arange(1, p + 1, dtype=torch.float64))
    parts = {
        "weight": draw(d, p) / p**0.5,
        "keys": root @ draw(p, n) + 0.1 * draw(p, n),
        "targets": draw(d, n),
        "covariance": root @ root.T,
        "memory": root @ draw(p, m) + 0.1 * draw(p, m) if m else None,
    }
    return case_of(**(parts | changes))


def least_change(gram: Tensor, keys: Tensor, residual: Tensor) -> Tensor:
    """Minimises tr(X G Xᵀ) subject to X K = R, from its optimality conditions: one bordered system for all rows."""
    p, n = keys.shape
    system = torch.zeros(p + n, p + n, dtype=torch.float64)
    system[:p, :p], system[:p, p:], system[p:, :p] = 2 * gram, keys, keys.T
    right = torch.cat([torch.zeros(p, len(residual), dtype=torch.float64), residual.T])
    return torch.linalg.solve(system, right)[:p].T
