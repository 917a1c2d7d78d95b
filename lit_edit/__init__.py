"""Sequential knowledge editing of language models as ordinary PyTorch Lightning."""

from importlib.metadata import PackageNotFoundError, version

import lit_edit.threads  # noqa: F401  before torch, whose threads read how to wait when they are loaded

# isort: split
from lit_edit.api import Session, edit, load_editor
from lit_edit.evaluation.evaluate import Reference, evaluate
from lit_edit.model.loading import load_model
from lit_edit.module import LitEdit
from lit_edit.requests import EditRequest, Probe, RequestError
from lit_edit.runs.delta import load_delta
from lit_edit.runs.journal import Edit, Journal

try:
    __version__ = version("lit-edit")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "unknown"

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
