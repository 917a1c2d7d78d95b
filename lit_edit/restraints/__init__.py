"""Restraints: what is done to an additive update, or to the sum of all updates, after it was solved for."""

from lit_edit.restraints.base import Ground, Restraint

__all__ = ["Ground", "Restraint"]
