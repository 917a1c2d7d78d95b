"""The change that each batch made to watched matrices, of a sample of batches that stays the same size."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from .every_n import count_edits
from .watched import Watched, oriented

Kept = dict[str, Tensor]
"""What is kept of one update of one matrix, by name; for subclasses to say."""


class UpdateSample(Watched, ABC):
    """Looks at ``ΔW = W_after − W_before`` of single batches, and keeps something of up to N of them.

    The update of a batch is what the matrix is when the next batch begins, less what it was when this one began: an
    edit with what was mended along with it, or an optimiser's step. With gradients accumulated over several batches it
    is that of all of them. Which batches are kept is decided by reservoir sampling: each of all batches so far with the
    same chance, the same ones for the same seed.

    Cost: a copy of the watched matrices for each batch that is looked at, held for one batch, and what a subclass
    computes. Of ``b`` batches about ``n (1 + ln(b / n))`` are looked at once ``b`` is above ``n``.

    Args:
        parameters: Names or patterns of the matrices, see `Watched`.
        n_updates: Updates to keep at most.
        every_n: Edits between two measurements, or the counts to measure at.
        at_end: Also measure the last count of the run.
        seed: Seed of the sample.

    Raises:
        ValueError: For fewer than two updates, and as `Watched` says.
    """

    def __init__(
        self,
        parameters: list[str] | None = None,
        n_updates: int = 50,
        every_n: int | list[int] = 25,
        at_end: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(parameters, every_n, at_start=False, at_end=at_end)
        if n_updates < 2:
            raise ValueError(f"n_updates should be at least 2, it is {n_updates}.")
        self.n_updates, self.seed = n_updates, seed
        self.kept: dict[int, dict[str, Kept]] = {}
        """By count of edits after the batch, ascending, then by matrix; matrices that did not change are missing."""
        self._batches = 0
        self._before: dict[str, Tensor] | None = None  # of a batch that is to be kept
        self._count_before: int | None = None  # None between two batches

    @abstractmethod
    def look(self, pl_module: LightningModule, name: str, before: Tensor, after: Tensor) -> Kept | None:
        """What to keep of an update.

        Args:
            pl_module: The module after the batch.
            name: Of the matrix.
            before: ``(d, p)``, the matrix before the batch.
            after: ``(d, p)``, now.

        Returns:
            Tensors by name; None keeps nothing.
        """

    @override
    def reset(self) -> None:
        super().reset()
        self.kept, self._batches, self._before, self._count_before = {}, 0, None, None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._close(trainer, pl_module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._count_before is None:
            self._open(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    @override
    def weights_replaced(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> None:
        self.kept = {count: found for count, found in self.kept.items() if count <= edits}
        if self._before is not None:
            self._before = {name: weight.detach().clone() for name, weight in self.select(pl_module).items()}

    def _open(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies the matrices, if the update to come is to be kept."""
        self._count_before = count_edits(trainer, pl_module)
        if self._place(self._batches + 1) is not None:
            self._before = {name: weight.detach().clone() for name, weight in self.select(pl_module).items()}

    def _place(self, number: int) -> int | None:
        """Which of the kept updates gives way to batch ``number``, from 1; None where it is not kept."""
        if number <= self.n_updates:
            return number - 1
        place = random.Random(f"{self.seed}/{number}").randrange(number)
        return place if place < self.n_updates else None

    @torch.no_grad()
    def _close(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps what the batches since `_open` did, if they did anything."""
        edits = count_edits(trainer, pl_module)
        if self._count_before in (None, edits):
            return
        self._batches += 1
        before, self._before, self._count_before = self._before, None, None
        if before is None:
            return
        found: dict[str, Kept] = {}
        for name, weight in self.select(pl_module).items():
            was = before.get(name)
            if was is None or was.shape != weight.shape or torch.equal(was, weight):
                continue
            kept = self.look(pl_module, name, oriented(pl_module, was, weight), oriented(pl_module, weight.detach()))
            if kept is not None:
                found[name] = {field: tensor.detach().cpu() for field, tensor in kept.items()}
        place = self._place(self._batches)
        counts = sorted(self.kept)
        if place is not None and place < len(counts):
            del self.kept[counts[place]]
        self.kept[edits] = found

    def of(self, name: str) -> dict[int, Kept]:
        """What was kept of a matrix, by count of edits, ascending."""
        return {count: found[name] for count, found in sorted(self.kept.items()) if name in found}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "kept": self.kept, "batches": self._batches}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.kept, self._batches = dict(state_dict["kept"]), int(state_dict["batches"])
