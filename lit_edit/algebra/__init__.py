"""Algebra on tensors: updates of a weight, Procrustes problems, subspaces. Pure functions, no model."""
