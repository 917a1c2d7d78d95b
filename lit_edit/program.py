"""What this program is called: as the user called it."""

from __future__ import annotations

import sys
from pathlib import Path


def program() -> str:
    """``python train.py`` in a checkout, else ``lit-edit``: the beginning of every command that is proposed."""
    return "python train.py" if Path(sys.argv[0]).name == "train.py" else "lit-edit"
