"""Sequential knowledge editing of language models as ordinary PyTorch Lightning."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import lit_edit.threads  # noqa: F401  before torch, whose threads read how to wait when they are loaded

if TYPE_CHECKING:
    from lit_edit.api import Session, edit, load_editor
    from lit_edit.evaluation.evaluate import Reference, evaluate
    from lit_edit.model.loading import load_model
    from lit_edit.module import LitEdit
    from lit_edit.requests import EditRequest, Probe, RequestError
    from lit_edit.runs.delta import load_delta
    from lit_edit.runs.journal import Edit, Journal

    __version__: str

__all__ = [
    "Edit",
    "EditRequest",
    "Journal",
    "LitEdit",
    "Probe",
    "Reference",
    "RequestError",
    "Session",
    "__version__",
    "edit",
    "evaluate",
    "load_delta",
    "load_editor",
    "load_model",
]

# Loaded when asked for: torch, Lightning and transformers take seconds, which a mistyped command should not cost.
_PLACES = {
    "lit_edit.api": ("Session", "edit", "load_editor"),
    "lit_edit.evaluation.evaluate": ("Reference", "evaluate"),
    "lit_edit.model.loading": ("load_model",),
    "lit_edit.module": ("LitEdit",),
    "lit_edit.program": ("__version__",),
    "lit_edit.requests": ("EditRequest", "Probe", "RequestError"),
    "lit_edit.runs.delta": ("load_delta",),
    "lit_edit.runs.journal": ("Edit", "Journal"),
}


def __getattr__(name: str) -> Any:
    place = next((place for place, names in _PLACES.items() if name in names), None)
    if place is None:
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(place), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
