"""What this program is called: as the user called it."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TRACEBACK = "LIT_EDIT_TRACEBACK"
"""The variable of the environment that lets errors end in a traceback."""

try:
    __version__ = version("lit-edit")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "unknown"


def program() -> str:
    """``python train.py`` in a checkout, else ``lit-edit``: the beginning of every command that is proposed."""
    return "python train.py" if Path(sys.argv[0]).name == "train.py" else "lit-edit"
