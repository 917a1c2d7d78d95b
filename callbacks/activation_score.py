"""How strongly the updates of other edits react to an edit's own key."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lit_edit.runs.pictures import Picture

from .every_n import count_edits
from .pictures import show
from .updates import Kept, UpdateSample
from .watched import oriented, owner_of


class ActivationScore(UpdateSample):
    r"""Logs the activation scores of edits (O-Edit, section 5.3 and appendix C.7, Fig. 5 and 8).

    .. math:: \text{unrelated}_j = ‖(ΔW_{total} - ΔW_j)\, k_j‖_2, \qquad \text{own}_j = ‖ΔW_j k_j‖_2

    with ``ΔW_total`` the sum of all updates so far, ``ΔW_j`` that of edit ``j`` and ``k_j`` its key. Where others react
    to a key as strongly as the edit's own update does, its value is lost.

    `lit_edit.LitEdit` says the keys of its edits (``latest_keys()``). In any other module the key of a batch is the
    mean input, over all rows, of the module that holds the matrix, in the batch's forward passes with gradients.

    Logs ``activation/unrelated`` and ``activation/own``, means over the kept edits and matrices. At the end a picture
    of each by the number of the edit goes to ``pictures/``, TensorBoard and the report.

    Cost: see `UpdateSample`, and products of kept keys with every watched matrix at each measurement. Keeps
    ``n_updates · (p + d)`` numbers per matrix and key, also in checkpoints. No ``ΔW_j`` is kept: ``ΔW_j k_j`` is.

    Args:
        parameters: Names or patterns of the matrices, see `Watched`.
        n_updates: Updates to keep at most.
        every_n: Edits between two measurements, or the counts to measure at.
        at_end: Also measure the last count of the run.
        seed: Seed of the sample.

    Example:
        >>> callback = ActivationScore(n_updates=200)
    """

    def __init__(
        self,
        parameters: list[str] | None = None,
        n_updates: int = 200,
        every_n: int | list[int] = 25,
        at_end: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(parameters, n_updates, every_n, at_end, seed)
        self._inputs: dict[str, tuple[Tensor, int]] = {}  # sum and number of rows
        self._hooks: list[RemovableHandle] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if callable(getattr(pl_module, "latest_keys", None)):
            return
        for name, weight in self.select(pl_module).items():
            owner = owner_of(pl_module, weight)
            if owner is not None:
                self._hooks.append(owner.register_forward_pre_hook(lambda _, args, name=name: self._see(name, args)))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _see(self, name: str, inputs: tuple[Any, ...]) -> None:
        """Adds the rows of a forward pass; those of measurements run without gradients."""
        if self._before is None or not torch.is_grad_enabled() or not inputs:
            return
        rows = inputs[0].detach()
        if rows.is_floating_point():
            rows = rows.reshape(-1, rows.shape[-1]).double()
            total, number = self._inputs.get(name, (torch.zeros_like(rows[0]), 0))
            self._inputs[name] = total + rows.sum(dim=0), number + len(rows)

    @override
    def _open(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._inputs = {}
        super()._open(trainer, pl_module)

    @override
    def look(self, pl_module: LightningModule, name: str, before: Tensor, after: Tensor) -> Kept | None:
        offered = getattr(pl_module, "latest_keys", None)
        if callable(offered):
            keys = offered().get(name)
        else:
            total, number = self._inputs.get(name, (None, 0))
            keys = None if total is None else (total / number)[:, None]
        if keys is None:
            return None
        keys = keys.to(device=after.device, dtype=torch.float64)
        return {"keys": keys.float(), "own": after.double() @ keys - before.double() @ keys}

    def scores(self, pl_module: LightningModule, name: str) -> dict[int, tuple[Tensor, Tensor]]:
        """``(unrelated, own)`` by count of edits, each ``(n,)`` over the keys of the batch, in float64."""
        weight = self.select(pl_module)[name].detach()
        total = oriented(pl_module, weight).double()
        total = total - oriented(pl_module, self.start(pl_module, name, weight), weight).double()
        found = {}
        for count, kept in self.of(name).items():
            keys, own = kept["keys"].to(total), kept["own"].to(total)
            found[count] = (total @ keys - own).norm(dim=0).cpu(), own.norm(dim=0).cpu()
        return found

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
        found = [pair for name in self.select(pl_module) for pair in self.scores(pl_module, name).values()]
        if not found:
            return {}
        unrelated, own = (torch.cat(list(side)).mean().item() for side in zip(*found, strict=True))
        return {"activation/unrelated": unrelated, "activation/own": own}

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        titles = {
            "unrelated": ("Activation by the updates of other edits", "O-Edit, Fig. 5: ‖(ΔW − ΔW_j) k_j‖."),
            "own": ("Activation by the edit's own update", "O-Edit, Fig. 8: ‖ΔW_j k_j‖."),
        }
        scores = {name: self.scores(pl_module, name) for name in self.select(pl_module)}
        if self.kept and not any(scores.values()):
            rank_zero_warn(
                f"ActivationScore found no keys of {type(pl_module).__name__}'s updates: it has nothing to show for "
                "editors without keys.",
                category=UserWarning,
            )
            return
        pictures = []
        for side, (which, (title, note)) in enumerate(titles.items()):
            series = {
                name: [[float(count), value] for count, pair in own.items() for value in pair[side].tolist()]
                for name, own in scores.items()
                if own
            }
            pictures.append(
                Picture(f"activation-{which}", title, note, "scatter", series, across="edit", up="activation score")
            )
        show(trainer, pictures if any(scores.values()) else [], count_edits(trainer, pl_module))
