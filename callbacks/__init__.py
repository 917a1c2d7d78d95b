"""Callbacks, reusable in any LightningModule."""

if __name__ != "lit_edit.callbacks":
    raise ImportError(
        "Import 'lit_edit.callbacks' instead of 'callbacks': the folder at the top of the repository is installed as "
        "part of lit_edit, and a second copy of its classes would not be the same classes."
    )

from .activation_score import ActivationScore
from .checkpoint import EditCheckpoint
from .collapse_guard import CollapseGuard
from .downstream_eval import DownstreamEval
from .edit_log import EditLog
from .edit_timer import EditTimer
from .every_n import EveryNEdits, count_edits
from .export import ExportModel
from .interruption import StopOnSignal
from .lm_eval import LMEval
from .matrix_stability import MatrixStability, matrix_figures, relative_drift, spectrum_drift
from .perplexity import Perplexity
from .progress import EditProgressBar
from .report import Report
from .representation_drift import RepresentationDrift
from .results_table import ResultsTable
from .retention import Retention
from .spectrum import Spectrum
from .update_orthogonality import UpdateOrthogonality

__all__ = [
    "ActivationScore",
    "CollapseGuard",
    "DownstreamEval",
    "EditCheckpoint",
    "EditLog",
    "EditProgressBar",
    "EditTimer",
    "EveryNEdits",
    "ExportModel",
    "LMEval",
    "MatrixStability",
    "Perplexity",
    "Report",
    "RepresentationDrift",
    "ResultsTable",
    "Retention",
    "Spectrum",
    "StopOnSignal",
    "UpdateOrthogonality",
    "count_edits",
    "matrix_figures",
    "relative_drift",
    "spectrum_drift",
]
