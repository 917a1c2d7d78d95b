"""Editors: from edit requests to weight updates."""

from lit_edit.editors.base import Editor, Plan
from lit_edit.editors.finetune import FineTune
from lit_edit.editors.guard import FailedEditError, Guard
from lit_edit.editors.locate_then_edit import LocateThenEdit
from lit_edit.editors.mend.editor import MEND
from lit_edit.editors.mending import Mending
from lit_edit.editors.mose_oft import MoseOFT
from lit_edit.editors.random_change import RandomChange

__all__ = [
    "MEND",
    "Editor",
    "FailedEditError",
    "FineTune",
    "Guard",
    "LocateThenEdit",
    "Mending",
    "MoseOFT",
    "Plan",
    "RandomChange",
]
