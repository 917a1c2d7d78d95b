"""TensorBoard for runs of edits: summaries first, single matrices apart, and the HParams tab."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from lit_edit.runs.results import INTERVAL

_MATRICES, _BOUNDS = "matrices", "intervals"


def board_tag(tag: str) -> str:
    """The name of a figure in TensorBoard, which makes a section of what stands before the first slash.

    Figures of single matrices and bounds of intervals, most of all there are, get sections of their own.

    Example:
        >>> board_tag("stability/model.layers.2.mlp.down_proj.weight/frobenius_norm")
        'matrices/model.layers.2.mlp.down_proj.weight/frobenius_norm'
    """
    first, *rest = tag.split("/")
    if first == "stability" and len(rest) > 1:
        return "/".join((_MATRICES, *rest))
    return "/".join((_BOUNDS, *rest)) if first == INTERVAL else tag


class EditBoard(TensorBoardLogger):
    """Lightning's logger, with figures in sections that put what sums up a run first."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({board_tag(tag): value for tag, value in metrics.items()}, step)

    @rank_zero_only
    def log_outcome(self, settings: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """Puts a run into the HParams tab, once its figures are known.

        Args:
            settings: What was run: plain values by name.
            figures: What came of it.
        """
        plain = {n: v if isinstance(v, (bool, int, float, str)) else str(v) for n, v in settings.items()}
        self.log_hyperparams(plain, metrics={f"hparams/{tag}": value for tag, value in figures.items()})
