"""Editors: from edit requests to weight updates."""

from lit_edit.editors.base import Applied, Editor, Plan
from lit_edit.editors.locate_then_edit import LocateThenEdit

__all__ = ["Applied", "Editor", "LocateThenEdit", "Plan"]
