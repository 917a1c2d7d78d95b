"""Tracing and single edits in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_edit.commands.locate.search import FIGURES, Found
from lit_edit.evaluation.tracing import Trace, draw_trace

_COLOURS = {"reliability": "#0072B2", "generalization": "#D55E00", "locality": "#009E73"}


def draw_findings(trace: Trace | None, tried: Sequence[Found], n_layers: int, path: Path) -> None:
    """Writes a PNG: average indirect effects above, single edits in one layer by method below.

    Args:
        trace: What tracing found; None leaves it out.
        tried: Trials; those in one layer, and λ as configured, are drawn.
        n_layers: Number of the model's layers.
        path: File to write.
    """
    from matplotlib.figure import Figure  # takes a second to import

    single = [found for found in tried if len(found.setting.layers) == 1 and found.setting.strength is None]
    methods = list(dict.fromkeys(found.setting.method for found in single))
    heights = ([3.0] if trace is not None else []) + ([2.6] if methods else [])
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    rows = list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    if trace is not None:
        draw_trace(trace, rows.pop(0).subplots(1, len(trace.effects), squeeze=False)[0])
    if methods:
        axes = rows.pop(0).subplots(1, len(methods), squeeze=False, sharey=True)[0]
        for axis, method in zip(axes, methods, strict=True):
            mine = {found.setting.layers[0]: found for found in single if found.setting.method == method}
            layers = sorted(mine)
            for name in FIGURES:
                having = [layer for layer in layers if name in mine[layer].figures]
                values = [mine[layer].figures[name] for layer in having]
                axis.plot(having, values, marker="o", label=name, color=_COLOURS[name], markersize=4)
            axis.set(title=f"single edits: {method}", xlabel="layer", xlim=(-0.5, n_layers - 0.5), ylim=(-0.05, 1.05))
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
