"""Runs side by side, each in a process of its own, and what is said about them while they go."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from lit_edit.commands.compare.runs import LOG, Run, State
from lit_edit.units import counted, time_text

THREADS = "OMP_NUM_THREADS"
LAST_LINES = 12
POLL = 0.2  # seconds
GRACE = 20.0  # seconds for a run that was told to end: it may be in the middle of an edit


def threads_per_run(jobs: int, environment: Mapping[str, str]) -> int | None:
    """CPU threads of each of several runs at a time: ``OMP_NUM_THREADS`` where it is set, else an equal share.

    None for one run at a time where nothing is set: it chooses by the size of its model, as ``fit`` does.
    """
    if environment.get(THREADS, "").isdigit():
        return max(1, int(environment[THREADS]))
    if jobs == 1:
        return None
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // jobs)


class Processes:
    """The processes of runs; after `end` none is started any more."""

    def __init__(self, threads: int | None) -> None:
        self.going: dict[Run, subprocess.Popen[bytes]] = {}
        self.begun: dict[Run, float] = {}
        self._environment = {**os.environ, **({} if threads is None else {THREADS: str(threads)})}
        self._lock = threading.Lock()
        self._ended = False

    def make(self, run: Run) -> int | None:
        """Makes a run, or goes on with it; gives its exit status, None if none may be started any more."""
        with self._lock:
            if self._ended:
                return None
            command = run.command
            run.prepare()
            self.begun[run] = time.monotonic()
            with (run.folder / LOG).open("ab") as log:
                process = self.going[run] = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self._environment
                )
        status = process.wait()
        del self.going[run]
        return status

    def end(self) -> None:
        """Ends all processes: they are told to, and killed after a while or at a second interruption."""
        with self._lock:
            self._ended = True
        going, until = list(self.going.values()), time.monotonic() + GRACE
        for process in going:
            process.terminate()
        try:
            for process in going:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))
        finally:
            for process in going:
                process.kill()  # of a process that has ended this does nothing


def run_all(runs: Sequence[Run], jobs: int, threads: int | None, console: Console) -> list[Run]:
    """Makes every run that is not complete.

    Args:
        runs: In the order in which they are started.
        jobs: Number at a time.
        threads: CPU threads of each; None leaves them to the runs.
        console: Where progress is said; a terminal also sees the runs that are going on.

    Returns:
        Those that failed; the end of their output was shown.

    Raises:
        SystemExit: After SIGTERM, when the runs that were going on have been ended, too.
    """
    before = {run: run.edits_done() for run in runs if run.state() is State.CUT}
    waiting = [run for run in runs if run.state() is not State.COMPLETE]
    if len(waiting) < len(runs):
        console.print(f"{len(runs) - len(waiting)} of {len(runs)} runs are complete already.", highlight=False)
    processes, failed, began = Processes(threads), [], time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Refreshed below and not by a thread of its own.
    bars = Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal)
    with _sigterm_ends(), bars, ThreadPoolExecutor(jobs) as pool:
        futures: dict[Future[int | None], Run] = {pool.submit(processes.make, run): run for run in waiting}
        shown: dict[Run, Any] = {}
        left = set(futures)
        try:
            while left:
                done, left = wait(left, timeout=POLL, return_when=FIRST_COMPLETED)
                for future in done:
                    run = futures[future]
                    complete = future.result() == 0 and run.state() is State.COMPLETE
                    if run in shown:
                        bars.remove_task(shown.pop(run))
                    made = sum(r.edits_done() - before.get(r, 0) for r in waiting)
                    to_make = sum(futures[f].n_edits - futures[f].edits_done() for f in left)
                    rest = (time.monotonic() - began) * to_make / made if made else 0
                    place = f"[{len(runs) - len(left)}/{len(runs)}] {run.name}, seed {run.seed}"
                    what = f"{'' if complete else 'failed after '}{counted(run.edits_done(), 'edit')}"
                    took = time_text(time.monotonic() - processes.begun[run])
                    console.print(Text(f"{place}: {what} in {took}{f', about {time_text(rest)} left' if rest else ''}"))
                    if complete:
                        run.tidy()
                        continue
                    failed.append(run)
                    for line in [*run.last_lines(LAST_LINES), f"(all of it: {run.folder / LOG})"]:
                        console.print(Text(f"    {line}"), soft_wrap=True)
                for run in list(processes.going) if console.is_terminal else ():
                    if run not in shown:
                        shown[run] = bars.add_task(f"{run.name}, seed {run.seed}", total=run.n_edits)
                    bars.update(shown[run], completed=run.edits_done())
                bars.refresh()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.end()
            raise
    return failed


@contextmanager
def _sigterm_ends() -> Iterator[None]:
    """Turns SIGTERM into SystemExit, instead of dying of it and leaving the runs behind.

    Only a program's main thread may handle signals; elsewhere nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the runs are being ended
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
