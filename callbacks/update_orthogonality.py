"""Whether the updates of different edits point into different directions."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lit_edit.runs.pictures import Picture

from .every_n import count_edits
from .pictures import show
from .updates import Kept, UpdateSample

_NEGLIGIBLE = 1e-4  # of an update's largest singular value: the rounding of float32 weights, no direction of the edit


class UpdateOrthogonality(UpdateSample):
    r"""Logs the cosines between the column spaces of different edits' updates (O-Edit, Fig. 4).

    Of each update the leading left singular vectors ``V_i (d, r)`` are kept. The cosine of two updates is

    .. math:: ‖V_i^\top V_j‖_F / \sqrt{\min(r_i, r_j)},

    1 if one column space contains the other and 0 if they are orthogonal; for ``r = 1``, as ROME's and MEMIT's single
    edits have, the absolute cosine of the two directions, which the paper draws. Two random directions of ``d``
    dimensions have about ``√(2 / (π d))``.

    Logs ``orthogonality/mean_cosine`` and ``orthogonality/max_cosine`` over all pairs of all matrices, and per matrix
    ``orthogonality/<parameter>/mean_cosine``. At the end a heat map for each matrix goes to ``pictures/``, TensorBoard
    and the report.

    Cost: see `UpdateSample`, and a singular value decomposition of rank ``rank + 4`` of each update that is looked at
    (8 ms for 320 × 768, 0.15 s for 2,048 × 5,632 on one core). Keeps ``n_updates · d · rank`` numbers per matrix, also
    in checkpoints.

    Args:
        parameters: Names or patterns of the matrices, see `Watched`.
        n_updates: Updates to compare at most; the paper has 50.
        rank: Directions of an update at most; those below a ten-thousandth of the first are left out.
        every_n: Edits between two measurements, or the counts to measure at.
        at_end: Also measure the last count of the run.
        seed: Seed of the sample.

    Raises:
        ValueError: For a rank below 1, and as `UpdateSample` says.

    Example:
        >>> callback = UpdateOrthogonality(n_updates=50, rank=1)
    """

    needs_start = False

    def __init__(
        self,
        parameters: list[str] | None = None,
        n_updates: int = 50,
        rank: int = 1,
        every_n: int | list[int] = 25,
        at_end: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(parameters, n_updates, every_n, at_end, seed)
        if rank < 1:
            raise ValueError(f"An update has at least one direction, rank is {rank}.")
        self.rank = rank

    @override
    def look(self, pl_module: LightningModule, name: str, before: Tensor, after: Tensor) -> Kept | None:
        change = after.double() - before.double()
        return None if not bool(torch.isfinite(change).all()) else {"directions": leading(change, self.rank).float()}

    def cosines(self, name: str) -> Tensor:
        """Of all pairs of kept updates of a matrix, ``(n, n)`` in float64, oldest first; 1 on the diagonal."""
        directions = [kept["directions"].double() for kept in self.of(name).values()]
        n = len(directions)
        found = torch.eye(n, dtype=torch.float64)
        for i in range(n):
            for j in range(i):
                found[i, j] = found[j, i] = cosine(directions[i], directions[j])
        return found

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
        figures: dict[str, float] = {}
        pairs = []
        for name in self.select(pl_module):
            found = self.cosines(name)
            if len(found) < 2:
                continue
            own = found[torch.ones_like(found).tril(-1).bool()]
            figures[f"orthogonality/{name}/mean_cosine"] = own.mean().item()
            pairs.append(own)
        if pairs:
            every = torch.cat(pairs)
            figures["orthogonality/mean_cosine"] = every.mean().item()
            figures["orthogonality/max_cosine"] = every.max().item()
        return figures

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        pictures = []
        for name in self.select(pl_module):
            found = self.cosines(name)
            if len(found) > 1:
                found.fill_diagonal_(float("nan"))  # every update's cosine with itself is 1
                pictures.append(
                    Picture(
                        name=f"orthogonality-{name}",
                        title=f"Cosines between updates of {name}",
                        note="O-Edit, Fig. 4: rows and columns are edits; 0 is orthogonal. The diagonal is left out.",
                        kind="heatmap",
                        matrix=found.tolist(),
                        labels=[str(count) for count in self.of(name)],
                        across="edit",
                        up="absolute cosine",
                    )
                )
        show(trainer, pictures, count_edits(trainer, pl_module))


def leading(change: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of a matrix, as far as they are none of rounding.

    Args:
        change: ``(d, p)`` in float64, not zero.
        rank: Number of vectors at most.

    Returns:
        ``(d, r)``, orthonormal, ``1 ≤ r ≤ rank``.
    """
    wanted = min(rank + 4, *change.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of a random projection: the same change has the same directions
        left, sizes, _ = torch.svd_lowrank(change, q=wanted, niter=4)
    number = max(1, int((sizes[:rank] > _NEGLIGIBLE * sizes[0]).sum()))
    return left[:, :number]


def cosine(one: Tensor, other: Tensor) -> float:
    """``‖V_iᵀ V_j‖_F / √min(r_i, r_j)`` of orthonormal bases ``(d, r_i)`` and ``(d, r_j)``."""
    return float(torch.linalg.matrix_norm(one.T @ other)) / min(one.shape[1], other.shape[1]) ** 0.5
