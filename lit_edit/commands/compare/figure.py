"""Curves over the number of edits, a panel for every quantity, at most eight methods a figure."""

from __future__ import annotations

import math
from pathlib import Path

from lit_edit.commands.compare.tables import QUANTITIES, Comparison

CURVES = 8  # of a figure: the colours of the palette, more cannot be told apart
PANELS = ("reliability", "generalization", "locality", "general_abilities", "norm", "condition_number")
_PALETTE = "tableau-colorblind10"
_LOGARITHMIC = ("norm", "condition_number")
_OF_EDITS = ("reliability", "generalization")  # at 0 edits there is nothing to retain


def draw(comparison: Comparison, path: Path) -> list[Path]:
    """Writes the figures; the format is told by the ending.

    A band is the 95 % interval of a single run, or the range of several seeds.

    Args:
        comparison: The runs.
        path: Of the first eight methods; ``-2`` and so on before the ending for the next ones.

    Returns:
        The files; none where nothing was measured.
    """
    panels = [p for p in PANELS if p in set(comparison.figures.quantity)]
    names = comparison.complete
    parts = [names[i : i + CURVES] for i in range(0, len(names), CURVES)] if panels else []
    paths = [path.with_stem(f"{path.stem}-{number}") if number > 1 else path for number in range(1, len(parts) + 1)]
    for part, target in zip(parts, paths, strict=True):
        _draw(comparison, part, panels, target)
    return paths


def _draw(comparison: Comparison, names: list[str], panels: list[str], path: Path) -> None:
    from matplotlib import style
    from matplotlib.figure import Figure  # without pyplot there is no global state, and no window

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with style.context(_PALETTE):
        figure = Figure(figsize=(3.4 * columns + 2.2, 2.9 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, panel in zip(axes, panels, strict=False):
            for number, name in enumerate(names):
                curve = comparison.curve(name, panel)
                curve = curve[curve.index > 0] if panel in _OF_EDITS else curve
                look = {"color": f"C{number}", "label": name}
                axis.plot(curve.index, curve["mean"], marker="o", markersize=3, linewidth=1.2, **look)
                axis.fill_between(curve.index, curve.low, curve.high, color=f"C{number}", alpha=0.12, linewidth=0)
            axis.set_title(QUANTITIES[panel], fontsize=10)
            axis.set_xlabel("edits", fontsize=9)
            axis.tick_params(labelsize=8)
            axis.set_xlim(left=0)
            axis.grid(alpha=0.3)
            if panel in _LOGARITHMIC:
                axis.set_yscale("log")
            else:
                axis.set_ylim(-0.03, 1.03)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, handlelength=3)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
