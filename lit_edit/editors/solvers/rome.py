"""ROME: one fact, written exactly, with the least change to everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_edit.algebra.linalg import solve_spd
from lit_edit.algebra.updates import LowRank, UnwritableError
from lit_edit.editors.solvers.base import Solver, check_positive, preserved_gram, residual
from lit_edit.editors.solvers.preserved import room_for_keys
from lit_edit.model.edited_weight import EditedWeight


class ROME(Solver):
    r"""Rank-one edit with an equality constraint (ROME, Meng et al. 2022, Eq. 2).

    .. math:: ΔW = \frac{(v - W k)\, u^\top}{u^\top k}, \qquad u = G^{-1} k, \qquad G = λ C + M M^\top

    Of all changes with ``(W + ΔW) k = v`` it has the least ``tr(ΔW G ΔWᵀ)``.

    Where the problem has value keys ``k'`` of its own, they take the place of ``k`` in the residual and in the
    denominator: with ``k`` the mean over contexts and ``k'`` the bare prompt's key this is what ROME's released code
    computes. One and the same key in every place is R-ROME (Gupta et al. 2024).

    Args:
        covariance: Use the key covariance ``C``, as the paper does. ``False`` takes ``C = I``, as some toolkits do; no
            statistics are then needed.
        memory: Add the keys of past edits, ``M``, to the preserved set; the paper has none.
        preservation: ``λ``, the weight of ``C`` against the memory, in tokens. Without memory it cancels.

    Raises:
        ValueError: if ``preservation`` is not positive.
    """

    mixes_keys = True
    max_batch = 1

    def __init__(self, covariance: bool = True, memory: bool = False, preservation: float = 1.0) -> None:
        super().__init__(memory)
        self.needs_covariance = covariance
        self.preservation = check_positive(preservation, "ROME's preservation")

    def kept_size(self, d: int, p: int) -> int:
        """The factor of the key covariance, and room for remembered keys."""
        if not self.needs_covariance:
            return 0
        return p * p + (room_for_keys(p) if self.use_memory else 0)

    def _solve(self, site: EditedWeight, keys: Tensor, targets: Tensor, value_keys: Tensor | None) -> LowRank:
        key = keys
        if not key.any():
            raise UnwritableError(
                f"The key of layer {site.name!r} is zero: no change of the weight can move its output."
            )
        memory = self.remembered(site)
        if self.needs_covariance:
            u = self.whitened_keys(site, key, self.preservation)
        elif memory.shape[1]:
            identity = torch.eye(len(key), dtype=torch.float64, device=key.device)
            u = solve_spd(preserved_gram(identity, memory, self.preservation), key)
        else:
            u = key
        value_key = key if value_keys is None else value_keys
        scale = u.T @ value_key
        if not scale.abs() > torch.finfo(torch.float64).eps * u.norm() * value_key.norm():
            raise ValueError(
                f"The two keys of layer {site.name!r} have nothing in common: no change along the one moves the "
                "output of the other. Use one key in both places (leave `value_keys` out)."
            )
        return LowRank(residual(site, keys, targets, value_keys) / scale, u.T)
