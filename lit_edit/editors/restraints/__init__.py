"""Restraints: what is done to an additive update, or to the sum of all updates, after it was solved for."""

from lit_edit.editors.restraints.base import Restraint, UpdateKind, check_restraints
from lit_edit.editors.restraints.controls import RandomDeletion, RandomSubspace, Scaling
from lit_edit.editors.restraints.o_edit import OEditPlus
from lit_edit.editors.restraints.prune import PRUNE
from lit_edit.editors.restraints.rect import RECT

__all__ = [
    "PRUNE",
    "RECT",
    "OEditPlus",
    "RandomDeletion",
    "RandomSubspace",
    "Restraint",
    "Scaling",
    "UpdateKind",
    "check_restraints",
]
