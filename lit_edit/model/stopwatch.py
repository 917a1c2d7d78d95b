"""Where the time of an edit goes: seconds by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up seconds under names. A stage within a stage counts for itself only, not for the outer one."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._running: list[list[float]] = []  # of each stage that runs, the seconds its inner stages took

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Counts the time of the block under ``stage``."""
        start = time.perf_counter()
        self._running.append([0.0])
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            (within,) = self._running.pop()
            if self._running:
                self._running[-1][0] += spent
            self._seconds[stage] = self._seconds.get(stage, 0.0) + spent - within

    def take(self) -> dict[str, float]:
        """What was counted since the last call, by stage; starts again from nothing."""
        taken, self._seconds = self._seconds, {}
        return taken
