"""Closed-form solvers: one file per method."""

from lit_edit.solvers.alphaedit import AlphaEdit
from lit_edit.solvers.base import Problem, Solver, preserved_gram
from lit_edit.solvers.memit import MEMIT
from lit_edit.solvers.mose import MOSE
from lit_edit.solvers.rome import ROME

__all__ = ["MEMIT", "MOSE", "ROME", "AlphaEdit", "Problem", "Solver", "preserved_gram"]
