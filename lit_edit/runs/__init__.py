"""What a run leaves behind: results, the journal of edits, checkpoints, deltas."""
