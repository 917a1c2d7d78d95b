"""Closed-form solvers: one file per method."""

from lit_edit.editors.solvers.alphaedit import AlphaEdit
from lit_edit.editors.solvers.base import Solver, preserved_gram, residual
from lit_edit.editors.solvers.emmet import EMMET
from lit_edit.editors.solvers.isospectral import Isospectral
from lit_edit.editors.solvers.memit import MEMIT
from lit_edit.editors.solvers.mose import MOSE
from lit_edit.editors.solvers.mose_key import MOSEKey
from lit_edit.editors.solvers.rome import ROME

__all__ = [
    "EMMET",
    "MEMIT",
    "MOSE",
    "ROME",
    "AlphaEdit",
    "Isospectral",
    "MOSEKey",
    "Solver",
    "preserved_gram",
    "residual",
]
