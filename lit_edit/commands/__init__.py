"""The commands beside ``fit`` and ``compare``: ``export`` and ``ask`` for what a run has made, and its rehearsal."""
