"""Where pictures of callbacks go: files in the run's folder, and TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lit_edit.runs.pictures import FOLDER, Picture, draw, write_picture


def show(trainer: Trainer, pictures: Sequence[Picture], edits: int) -> None:
    """Writes pictures into ``pictures/`` of the run's folder and adds them to TensorBoard, where that is a logger.

    Args:
        trainer: Of the run. To be called on every rank; the first one writes.
        pictures: What is drawn.
        edits: Edits so far.
    """
    folder = trainer.log_dir  # asked for on every rank: it is broadcast
    if not trainer.is_global_zero:
        return
    boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    for picture in pictures:
        if folder is not None:
            write_picture(Path(folder) / FOLDER, picture)
        for board in boards:
            board.experiment.add_image(f"pictures/{picture.name}", _pixels(picture), edits, dataformats="HWC")


def _pixels(picture: Picture) -> np.ndarray:
    """``(height, width, 3)``, 8 bits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(draw(picture))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3]
