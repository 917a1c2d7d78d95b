"""``spectra.json``: singular values of the watched weights before the first edit and after the last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lit_edit.files import write_json

FILE_NAME = "spectra.json"
"""``{parameter: {"before": [...], "after": [...]}}``: singular values, largest first; null where not finite."""

_DIGITS = 7  # what float32 weights hold


def write_spectra(path: Path, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Writes the file.

    Args:
        path: Target; replaced in one step.
        before: Singular values by parameter, shape ``(rank,)``, of the unedited weights.
        after: The same of the weights now.
    """
    names = [name for name in after if name in before]
    write_json(path, {name: {"before": _plain(before[name]), "after": _plain(after[name])} for name in names})


def _plain(values: Tensor) -> list[float | None]:
    return [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]
