"""MEND: an editor with a trained hyper-network."""
