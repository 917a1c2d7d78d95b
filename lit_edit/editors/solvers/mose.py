"""MOSE: multiply the weight by the orthogonal matrix that fits old and new knowledge best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lit_edit.algebra.krylov import Preserved, procrustes_near_identity
from lit_edit.algebra.linalg import procrustes
from lit_edit.algebra.updates import Rotation, Update
from lit_edit.editors.solvers.base import Solver, check_positive
from lit_edit.model.edited_weight import EditedWeight

FOLD_AT = 64  # columns beside the eigenbasis, at least
_NAME = "MOSE.eigenvectors"  # of what is kept for a layer


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
    eigenvectors are computed once per layer and carried from edit to edit; see `lit_edit.algebra.krylov` for the rest.

    Args:
        preservation: ``λ``, how many tokens' worth of the corpus weighs against one edited key.
        memory: Add the keys of past edits to the preserved set. The paper has none; without them later rotations turn
            earlier edits away.
        method: ``krylov``, or ``svd`` of the dense ``d × d`` matrix at every edit, exactly as Eq. 19 has it. Their
            objectives agree to 1e-9.

    Raises:
        ValueError: If ``preservation`` is not positive or the method is unknown.
    """

    additive = False

    def __init__(
        self, preservation: float = 1.0, memory: bool = True, method: Literal["krylov", "svd"] = "krylov"
    ) -> None:
        super().__init__(memory)
        self.preservation = check_positive(preservation, "MOSE's preservation")
        if method not in ("krylov", "svd"):
            raise ValueError(f"The method of MOSE is 'krylov' or 'svd', not {method!r}.")
        self.method = method

    def _solve(self, site: EditedWeight, keys: Tensor, targets: Tensor, value_keys: Tensor | None) -> Rotation:
        outputs = site.exact @ keys
        if self.method == "svd" or _too_wide(site, keys):
            return Rotation(procrustes(self._gram(site).addmm_(targets, outputs.T)))
        solution = procrustes_near_identity(self._preserved(site), targets, outputs)
        return Rotation(solution.turn, solution.basis)

    def _preserved(self, site: EditedWeight) -> Preserved:
        """``λ W C Wᵀ + (W M)(W M)ᵀ`` by its eigenvectors."""
        kept, remembered = site.kept.get(_NAME), self.remembered(site)
        if kept is None or not self._fits(kept, site):
            kept = _record(Preserved.of(self._gram(site)), remembered, site, self.preservation)
        known = int(kept["known"])
        if remembered.shape[1] > known:
            preserved = _preserved(kept).with_columns(site.exact @ remembered[:, known:])
            if preserved.factor.shape[1] > max(FOLD_AT, len(preserved.values) // 16):
                preserved = preserved.folded()
            kept = _record(preserved, remembered, site, self.preservation)
        site.kept[_NAME] = kept
        return _preserved(kept)

    def _fits(self, kept: Mapping[str, Tensor], site: EditedWeight) -> bool:
        same_keys = not int(kept["known"]) or (self.use_memory and int(kept["forgotten"]) == site.forgotten)
        same_weight = int(kept["version"]) == site.version
        return same_keys and same_weight and float(kept["preservation"]) == self.preservation

    def written(self, site: EditedWeight, update: Update) -> None:
        """Turns the eigenvectors along with the weight."""
        kept = site.kept.get(_NAME)
        if kept is None:
            return
        if isinstance(update, Rotation) and update.basis is not None:
            turned = _preserved(kept).turned(update.basis, update.turn)
            site.kept[_NAME] = {**kept, "vectors": turned.vectors, "version": torch.tensor(site.version)}
        else:
            del site.kept[_NAME]

    def kept_size(self, d: int, p: int) -> int:
        """The eigenvectors, and what stands beside them; none with ``method="svd"``."""
        return 0 if self.method == "svd" else d * (d + max(FOLD_AT, d // 16))

    def _gram(self, site: EditedWeight) -> Tensor:
        """``λ W C Wᵀ + (W M)(W M)ᵀ``, ``(d, d)``."""
        outputs = site.exact @ self.remembered(site)
        return (self.preservation * site.exact.spread(self.covariance(site))).addmm_(outputs, outputs.T)


def _too_wide(site: EditedWeight, keys: Tensor) -> bool:
    """Whether the batch is so large that a Krylov space for it would fill the whole one."""
    return 60 * keys.shape[1] >= site.shape[0]


def _record(preserved: Preserved, remembered: Tensor, site: EditedWeight, preservation: float) -> dict[str, Tensor]:
    """What is kept for a layer, as tensors for its checkpoint: computed anew they would differ in the last bits."""
    return {
        "values": preserved.values,
        "vectors": preserved.vectors,
        "factor": preserved.factor,
        "known": torch.tensor(remembered.shape[1]),
        "forgotten": torch.tensor(site.forgotten),
        "version": torch.tensor(site.version),
        "preservation": torch.tensor(preservation, dtype=torch.float64),
    }


def _preserved(kept: Mapping[str, Tensor]) -> Preserved:
    return Preserved(kept["values"], kept["vectors"], kept["factor"])
