"""MOSE: multiply the weight by the orthogonal matrix that fits old and new knowledge best."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from lit_edit.algebra.exact import ExactWeight
from lit_edit.algebra.krylov import Preserved, procrustes_near_identity
from lit_edit.algebra.linalg import procrustes, version_of
from lit_edit.algebra.updates import Rotation, ThinRotation, Update
from lit_edit.editors.solvers.base import Problem, Solver, check_positive
from lit_edit.editors.solvers.kept import marks

FOLD_AT = 64  # columns beside the eigenbasis, at least


class MOSE(Solver):
    r"""Multiplicative orthogonal edit, ``W ← Q W`` (MOSE, Eq. 15-20).

    Under the constraint ``Qᵀ Q = I`` (Eq. 15) it minimises

    .. math:: λ\, E‖Q W k - W k‖^2 + ‖Q W M - W M‖^2 + ‖Q W K - V‖^2

    over the tokens of a corpus, the keys ``M`` of past edits and the keys ``K`` of this batch (Eq. 16-17; ``M`` is an
    addition). That is the orthogonal Procrustes problem ``min ‖Q A − B‖`` (Eq. 18; Schönemann 1966) with

    .. math:: B A^\top = λ W C W^\top + (W M)(W M)^\top + V (W K)^\top = U Σ H^\top, \qquad Q = U H^\top

    (Eq. 19-20). Norms, singular values and condition number of ``W`` do not change. Because ``Q`` preserves lengths
    too, only targets as long as the present outputs, ``‖v‖ = ‖W k‖``, can be reached: optimise them on that sphere.

    All but the last term are symmetric positive definite, and as an edit turns ``W`` it turns them along. Their
    eigenvectors are computed once per layer and carried from edit to edit; see `lit_edit.algebra.krylov` for the
    rest. They are
    computed anew where a weight is no longer what the rotations made of it: because others changed it, or by the
    rounding of a dtype of 16 bits where that is not carried along (a problem's ``remainder``, which editors see to).

    Args:
        preservation: ``λ``, how many tokens' worth of the corpus weighs against one edited key.
        memory: add the keys of past edits to the preserved set. The paper has none; without them later rotations turn
            earlier edits away.
        drift: how far outputs of the weight may be, in proportion, from what the rotations made of them, before the
            eigenvectors are computed anew. 1e-3 never does so in a run in float32, nor in half precision with what
            rounding takes carried along. Without that it does at every edit in bfloat16; 0.02 then saves it for some
            hundred edits, of which the last is up to 3e-4 less good, in proportion to the objective of no edit.
        method: ``krylov``, or ``svd`` of the dense ``d × d`` matrix at every edit, to the letter of Eq. 19. Their
            objectives agree to 1e-9.

    Raises:
        ValueError: if ``preservation`` or ``drift`` is not positive or the method is unknown.
    """

    additive = False

    def __init__(
        self,
        preservation: float = 1.0,
        memory: bool = True,
        drift: float = 1e-3,
        method: Literal["krylov", "svd"] = "krylov",
    ) -> None:
        super().__init__(memory)
        self.preservation = check_positive(preservation, "MOSE's preservation")
        if method not in ("krylov", "svd"):
            raise ValueError(f"The method of MOSE is 'krylov' or 'svd', not {method!r}.")
        self.drift, self.method = check_positive(drift, "MOSE's drift"), method
        self._carried: dict[str, _Carried] = {}
        self._stamps: dict[str, tuple[Tensor, int, Tensor]] = {}

    @torch.no_grad()
    def solve(self, problem: Problem) -> Update:
        """The rotation ``Q``.

        Raises:
            ValueError: if the covariance is missing.
        """
        weight, keys = problem.exact, problem.keys
        covariance, remembered = self.covariance(problem), self.remembered(problem)
        if self.method == "svd" or _too_wide(problem):
            m = self._gram(weight, covariance, remembered)
            return Rotation(procrustes(m.addmm_(problem.targets, (weight @ keys).T)))
        carried, stamp = self._carried.get(problem.layer), self._stamp(covariance, problem.layer)
        if carried is not None:
            carried = carried.as_found(weight, remembered, stamp, self.drift)
        if carried is None:
            carried = _Carried.of(self._gram(weight, covariance, remembered), weight, remembered, stamp)
        solution = procrustes_near_identity(carried.preserved, problem.targets, weight @ keys)
        update = ThinRotation(solution.basis, solution.turn)
        self._carried[problem.layer] = carried.after(update)
        return update

    def _stamp(self, covariance: Tensor, layer: str) -> Tensor:
        """Numbers by which ``λ`` and a covariance are known again, also by another process."""
        known = self._stamps.get(layer)
        if known is None or known[0] is not covariance or known[1] != version_of(covariance):
            held = covariance.detach().to(torch.float64)
            probe = _sine(len(held), held.device)
            stamp = torch.stack([held.trace(), probe @ held @ probe]).cpu()
            known = self._stamps[layer] = (covariance, version_of(covariance), stamp)
        return known[2] * self.preservation

    def kept_size(self, d: int, p: int) -> int:
        """The eigenvectors, and what stands beside them; none with ``method="svd"``."""
        return 0 if self.method == "svd" else d * (d + max(FOLD_AT, d // 16))

    def passing_size(self, d: int, p: int) -> int:
        """What is preserved, its eigenvectors and the work space for these, and some rows of ``W C``."""
        return 4 * d * d + 2 * 512 * p

    def _gram(self, weight: ExactWeight, covariance: Tensor, remembered: Tensor) -> Tensor:
        """``λ W C Wᵀ + (W M)(W M)ᵀ``, ``(d, d)``."""
        outputs = weight @ remembered
        return (self.preservation * weight.spread(covariance)).addmm_(outputs, outputs.T)

    def state_dict(self) -> dict[str, Tensor]:
        """The eigenvectors carried, by layer: computed anew they would differ in the last bits."""
        return {
            f"{layer}.{name}": tensor
            for layer, kept in self._carried.items()
            for name, tensor in kept.tensors().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores them."""
        by_layer: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            layer, field = name.rsplit(".", 1)
            by_layer.setdefault(layer, {})[field] = tensor
        self._carried = {layer: _Carried.from_tensors(tensors) for layer, tensors in by_layer.items()}


def _too_wide(problem: Problem) -> bool:
    """Whether the batch is so large that a Krylov space for it would fill the whole one."""
    return 60 * problem.keys.shape[1] >= problem.weight.shape[0]


@dataclass(frozen=True, eq=False)
class _Carried:
    """``S = λ W C Wᵀ + (W M)(W M)ᵀ`` by its eigenvectors, and how to tell that it is still that of the weight.

    ``before`` and ``now`` are the output of a fixed vector before and after the last rotation, which may not have been
    applied; ``basis`` and ``turn`` are that rotation. ``columns`` counts the remembered keys that are in ``S``,
    ``marked`` are a few of them. ``stamp`` knows ``λ C`` again. ``strayed`` is the root of the summed squares of what
    every write so far took, or others changed, of that output, relative to it.
    """

    values: Tensor
    vectors: Tensor
    factor: Tensor
    before: Tensor
    now: Tensor
    basis: Tensor
    turn: Tensor
    columns: Tensor
    marked: Tensor
    stamp: Tensor
    strayed: Tensor

    @classmethod
    def of(cls, gram: Tensor, weight: ExactWeight, remembered: Tensor, stamp: Tensor) -> _Carried:
        found = Preserved.of(gram)
        output = _probe(weight)
        nothing = output.new_zeros(len(output), 0)
        return cls(
            found.values, found.vectors, found.factor, output, output, nothing, nothing.T @ nothing,
            torch.tensor(remembered.shape[1]), marks(remembered, remembered.shape[1]), stamp,
            torch.tensor(0.0, dtype=torch.float64),
        )  # fmt: skip

    @property
    def preserved(self) -> Preserved:
        return Preserved(self.values, self.vectors, self.factor)

    def as_found(self, weight: ExactWeight, remembered: Tensor, stamp: Tensor, drift: float) -> _Carried | None:
        """What is carried for the weight as it is and all that is remembered now; None if it does not fit."""
        output, known = _probe(weight), int(self.columns)
        if not torch.allclose(stamp, self.stamp.cpu(), rtol=1e-9, atol=0.0):
            return None
        if remembered.shape[1] < known or not torch.equal(marks(remembered, known), self.marked):
            return None
        length = float(output.norm())
        if_turned, if_not = float((output - self.now).norm()), float((output - self.before).norm())
        strayed = math.hypot(float(self.strayed), min(if_turned, if_not) / length if length else 0.0)
        if not strayed <= drift:
            return None
        preserved = self.preserved
        if if_turned <= if_not:
            preserved = preserved.turned(self.basis, self.turn)
        if remembered.shape[1] > known:
            preserved = preserved.with_columns(weight @ remembered[:, known:])
        if preserved.factor.shape[1] > max(FOLD_AT, len(preserved.values) // 16):
            preserved = preserved.folded()
        nothing = output.new_zeros(len(output), 0)
        return _Carried(
            preserved.values, preserved.vectors, preserved.factor, output, output, nothing, nothing.T @ nothing,
            torch.tensor(remembered.shape[1]), marks(remembered, remembered.shape[1]), stamp,
            torch.tensor(strayed, dtype=torch.float64),
        )  # fmt: skip

    def after(self, update: ThinRotation) -> _Carried:
        """With a rotation that was found but may not be applied."""
        tensors = self.tensors()
        output = self.before[:, None]
        tensors |= {"now": (output + update.delta(output))[:, 0], "basis": update.basis, "turn": update.turn}
        return _Carried.from_tensors(tensors)

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> _Carried:
        return cls(**tensors)


def _probe(weight: ExactWeight) -> Tensor:
    """The output (d,) of a fixed vector: what every rotation turns, and every other change of the weight changes."""
    return weight @ _sine(weight.shape[1], weight.device)


def _sine(n: int, device: torch.device) -> Tensor:
    """A fixed vector (n,) of about unit length without any structure."""
    return torch.sin(torch.arange(1, n + 1, dtype=torch.float64, device=device) * 1.7) / n**0.5
