"""Singular values before and after, as a picture, with spectral and L1 norm."""

from __future__ import annotations

import math

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lit_edit.algebra.linalg import spectral_norm
from lit_edit.runs.pictures import Picture
from lit_edit.runs.report.gather import thinned

from .every_n import count_edits
from .matrix_stability import MatrixStability
from .pictures import show

_KEPT = ("spectral_norm", "l1_norm")


class Spectrum(MatrixStability):
    """Draws the singular values of watched matrices before the first edit and after the last.

    Logs ``spectrum/<parameter>/spectral_norm``, ``.../l1_norm`` (the sum of absolute entries: EAC Fig. 2) and
    ``.../update_spectral_norm`` (``‖W − W_0‖₂``: PRUNE Table 1, O-Edit Table 2) at every measurement, writes
    ``spectra.json``, and at the end a picture for each matrix to ``pictures/`` and TensorBoard.
    `MatrixStability`, which `lit-edit fit` always has, logs these norms and more; this one is for runs without it, and
    for the pictures.

    Cost: a singular value decomposition of every watched matrix without vectors, and a spectral norm, in float64, at
    every measurement: 0.03 s for 320 × 768, 2.5 s for 2,048 × 5,632 on one core.

    Args:
        parameters: Names or patterns of the matrices, see `Watched`.
        every_n: Edits between two measurements, or the counts to measure at.
        at_start: Also measure before the first edit.
        at_end: Also measure the last count of the run.

    Example:
        >>> callback = Spectrum(parameters=["*.weight"], every_n=1000)
    """

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
        figures = super().measure(trainer, pl_module, edits)
        parts = {tag: tag.split("/") for tag in figures}
        found = {
            f"spectrum/{part[1]}/{part[2]}": figures[tag]
            for tag, part in parts.items()
            if len(part) == 3 and part[2] in _KEPT
        }
        for name, weight in self.select(pl_module).items():
            total = weight.detach().double() - self.start(pl_module, name, weight).double()
            size = float(total.norm())  # 0 before the first edit; not finite for a model that has diverged
            moved = spectral_norm(total) if 0 < size < math.inf else size
            found[f"spectrum/{name}/update_spectral_norm"] = moved
        return found

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        pictures = [spectrum_picture(name, *sides) for name, sides in self.spectra.items()]
        show(trainer, pictures, count_edits(trainer, pl_module))


def spectrum_picture(name: str, before: Tensor, after: Tensor) -> Picture:
    """Singular values of one matrix, largest first, on a logarithmic scale.

    Args:
        name: Of the matrix.
        before: ``(rank,)``, before the first edit.
        after: ``(rank,)``, now.
    """
    sides = {"before": thinned(before.tolist()), "after": thinned(after.tolist())}
    return Picture(
        name=f"spectrum-{name}",
        title=f"Singular values of {name}",
        note="Before the first edit and after the last, largest first.",
        kind="lines",
        series=sides,
        across="place",
        up="singular value",
        scale="log",
        on_page=False,  # the report draws spectra.json among the weights
    )
