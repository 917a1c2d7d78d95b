"""``pictures/``: what analysis callbacks draw, each as data for the report (JSON) and as PNG and SVG."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lit_edit.files import write_json, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "pictures"
Kind = Literal["lines", "scatter", "heatmap"]
Scale = Literal["linear", "log"]
Points = list[list[float | None]]

_DIGITS = 4
# Eight colours that differ for the colour-blind too (after Okabe and Ito, with grey for their yellow).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F7F7F")
_MARKS = ("o", "s", "^", "D", "v", "P")


class PictureError(ValueError):
    """A file that holds no picture; the message names it."""


@dataclass(frozen=True)
class Picture:
    """A picture as plain data.

    Attributes:
        name: What its files are called, and its tag in TensorBoard.
        title: For people.
        note: What it shows, in a sentence.
        kind: ``lines`` and ``scatter`` draw ``series``, ``heatmap`` draws ``matrix``.
        series: ``[[x, y], ...]`` by label.
        matrix: Square, from 0 on; None where there is no value.
        labels: One for each row of the matrix.
        across: What x is, or what rows and columns of the matrix are.
        up: What y is, or what the entries of the matrix are.
        scale: Of y.
        on_page: Whether the report's section of pictures has it.

    Raises:
        ValueError: If the kind is unknown, or the matrix is not square with a label for each row.
    """

    name: str
    title: str
    note: str
    kind: Kind
    series: Mapping[str, Points] = field(default_factory=dict)
    matrix: Sequence[Sequence[float | None]] = ()
    labels: Sequence[str] = ()
    across: str = ""
    up: str = ""
    scale: Scale = "linear"
    on_page: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or self.scale not in get_args(Scale):
            raise ValueError(f"A picture is one of {', '.join(get_args(Kind))}, not {self.kind!r} ({self.scale!r}).")
        if any(len(row) != len(self.matrix) for row in self.matrix) or len(self.labels) != len(self.matrix):
            raise ValueError(f"The matrix of {self.name!r} is not square, or has not a label for each row.")

    @property
    def stem(self) -> str:
        """Its name as that of a file."""
        return re.sub(r"[^\w.-]+", "-", self.name)


def write_picture(folder: Path, picture: Picture) -> None:
    """Writes ``<stem>.json``, ``.svg`` and ``.png``, each replaced in one step.

    Args:
        folder: Target, made if missing.
        picture: What is drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{picture.stem}.json", _rounded(asdict(picture)))
    figure = draw(picture)
    for ending in ("svg", "png"):
        write_whole(folder / f"{picture.stem}.{ending}", partial(_save, figure, ending))


def read_pictures(folder: Path) -> tuple[list[Picture], list[str]]:
    """The pictures of a run, by name.

    Args:
        folder: With their JSON files; none if it is missing.

    Returns:
        The pictures, and what is wrong with files that hold none, a sentence each.
    """
    found, wrong = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(read_picture(path))
        except PictureError as error:
            wrong.append(f"{error}.")
    return found, wrong


def read_picture(path: Path) -> Picture:
    """One picture.

    Raises:
        PictureError: If the file holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        made = Picture(**content)
        points = [point for series in made.series.values() for point in series]
        numbers = [value for x, y in points for value in (x, y)] + [value for row in made.matrix for value in row]
        if not all(value is None or isinstance(value, int | float) for value in numbers):
            raise TypeError("it holds something that is no number")
    except (ValueError, TypeError, AttributeError) as error:
        raise PictureError(f"{FOLDER}/{path.name} is no picture ({error})") from error
    return made


def draw(picture: Picture) -> Figure:
    """A figure of matplotlib, without a window and without global state."""
    # Not at the top: it takes a second to import.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axis: Any = figure.subplots()
    axis.set_title(picture.title, fontsize=10)
    if picture.kind == "heatmap":
        size = len(picture.matrix)
        values = [[math.nan if value is None else value for value in row] for row in picture.matrix]
        image = axis.imshow(values, cmap="viridis", vmin=0.0, interpolation="nearest")
        shown = range(0, size, max(1, size // 10))
        axis.set_xticks(list(shown), [picture.labels[i] for i in shown], fontsize=7, rotation=90)
        axis.set_yticks(list(shown), [picture.labels[i] for i in shown], fontsize=7)
        axis.set_xlabel(picture.across, fontsize=9)
        figure.colorbar(image, ax=axis, label=picture.up)
        return figure
    for place, (label, points) in enumerate(picture.series.items()):
        known = [(x, y) for x, y in points if x is not None and y is not None]
        xs, ys = [x for x, _ in known], [y for _, y in known]
        colour = _COLOURS[place % len(_COLOURS)]
        if picture.kind == "lines":
            axis.plot(xs, ys, label=label, color=colour, linewidth=1.3)
        else:
            axis.scatter(xs, ys, label=label, color=colour, marker=_MARKS[place % len(_MARKS)], s=10, alpha=0.6)
    if picture.scale == "log" and any(y is not None and y > 0 for s in picture.series.values() for _, y in s):
        axis.set_yscale("log")
    axis.set_xlabel(picture.across, fontsize=9)
    axis.set_ylabel(picture.up, fontsize=9)
    axis.grid(alpha=0.3)
    if picture.series:
        axis.legend(fontsize=7)
    return figure


def _save(figure: Figure, ending: str, path: Path) -> None:
    """Writes a figure; the same figure gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "lit-edit"}):
        figure.savefig(path, format=ending, dpi=120, metadata={"Date": None} if ending == "svg" else None)


def _rounded(value: Any) -> Any:
    """Four digits; null for what is not finite."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
