"""Curves over the number of edits, a panel for every quantity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lit_edit.commands.compare.tables import QUANTITIES, Comparison

# Eight colours that differ for the colour-blind too (after Okabe and Ito, with grey for their yellow), in three styles
# of line: 24 methods can be told apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F7F7F")
_STYLES = (("-", "o"), ("--", "s"), (":", "^"))

_PANELS = ("reliability", "generalization", "locality", "general_abilities", "norm", "condition_number")
_LOGARITHMIC = ("norm", "condition_number", "drift")
_OF_EDITS = ("reliability", "generalization")  # at 0 edits there is nothing to retain


def style(number: int) -> dict[str, Any]:
    """Colour, line and marker of a method by its place."""
    line, marker = _STYLES[number // len(_COLOURS) % len(_STYLES)]
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": line, "marker": marker}


def draw(comparison: Comparison, path: Path) -> None:
    """Writes the figure; the format is told by the ending. Several seeds show as a band from smallest to largest."""
    # Not at the top: the other commands do not need it, and it takes a second to import. `Figure` without pyplot has
    # no global state and opens no window.
    from matplotlib.figure import Figure

    panels = [p for p in _PANELS if any(comparison.curve(name, p) for name in comparison.methods)]
    columns = min(3, max(1, len(panels)))
    rows = math.ceil(len(panels) / columns) or 1
    many = len(comparison.methods) > len(_COLOURS)
    width, height = (4.6, 3.9) if many else (3.4, 2.9)
    legend = 0.18 * len(comparison.methods) + 0.3
    figure = Figure(figsize=(width * columns + 2.2, max(height * rows, legend)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes, panels, strict=False):
        for number, name in enumerate(comparison.methods):
            curve = {n: s for n, s in comparison.curve(name, panel).items() if n or panel not in _OF_EDITS}
            if not curve:
                continue
            counts, spreads = list(curve), list(curve.values())
            means = [math.nan if s.mean is None else s.mean for s in spreads]
            look = style(number)
            (handles[name],) = axis.plot(counts, means, markersize=3, linewidth=1.2, label=name, **look)
            if len(comparison.seeds) > 1:
                low, high = zip(*[[math.nan if b is None else b for b in s.bounds] for s in spreads], strict=True)
                axis.fill_between(counts, low, high, color=look["color"], alpha=0.05 if many else 0.15, linewidth=0)
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
    if handles:
        ordered = [name for name in comparison.methods if name in handles]
        figure.legend([handles[n] for n in ordered], ordered, loc="outside right upper", fontsize=8, handlelength=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
