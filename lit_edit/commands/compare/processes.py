"""Runs side by side, each in a process of its own, and what is said about them while they go."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lit_edit.commands.compare.runs import LOG, Run, State

THREADS = "OMP_NUM_THREADS"
LAST_LINES = 12

_POLL = 0.2  # seconds
_GRACE = 20.0  # for a run that was told to end: it may be in the middle of an edit
_REFRESH = 2.0


def threads_per_run(jobs: int, environment: Mapping[str, str]) -> int:
    """CPU threads of each of so many runs at a time: ``OMP_NUM_THREADS`` where it is set, else an equal share.

    Sums round differently with another number of threads, and a run of hundreds of edits drifts apart by it.
    """
    if environment.get(THREADS, "").isdigit():
        return max(1, int(environment[THREADS]))
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // jobs)


@dataclass
class Process:
    """A run that is going on."""

    run: Run
    popen: subprocess.Popen[bytes]
    begun: float
    edits_before: int
    edits: int = 0


@dataclass
class Progress:
    """How far a comparison is.

    Args:
        total: its runs.
        edits: how many edits the runs that are not complete still have to make.
        done: runs that are complete or have failed.
        made: edits made since the start, by runs that have ended.
        begun: when it started, in seconds of the same clock as `rest`'s ``now``.
    """

    total: int
    edits: int
    done: int = 0
    made: int = 0
    begun: float = field(default_factory=time.monotonic)

    def rest(self, now: float, going: Iterable[Process]) -> float | None:
        """Seconds until the end, as far as the edits so far tell; None before the first."""
        made = self.made + sum(max(0, p.edits - p.edits_before) for p in going)
        return (now - self.begun) * (self.edits - made) / made if made else None


def run_all(runs: Sequence[Run], jobs: int, threads: int, console: Console) -> list[Run]:
    """Makes every run that is not complete.

    Args:
        runs: in the order in which they are started.
        jobs: how many at a time.
        threads: CPU threads of each.
        console: where progress is said; a terminal also sees the runs that are going on.

    Returns:
        Those that failed; the end of their output was shown.

    Raises:
        SystemExit: after SIGTERM, when the runs that were going on have been ended, too.
    """
    states = {run: run.state() for run in runs}
    waiting = [run for run in runs if states[run] is not State.COMPLETE]
    progress = Progress(len(runs), sum(run.n_edits - _kept(run, states[run]) for run in waiting))
    progress.done = len(runs) - len(waiting)
    if progress.done:
        console.print(f"{progress.done} of {len(runs)} runs are complete already.", highlight=False)
    going: list[Process] = []
    failed: list[Run] = []
    looked = 0.0
    with _told_to_end() as ended, Live(console=console, auto_refresh=False, transient=True) as live:
        try:
            while waiting or going:
                if ended():
                    raise SystemExit(128 + signal.SIGTERM)
                while waiting and len(going) < jobs:
                    run = waiting.pop(0)
                    going.append(_start(run, threads, _kept(run, states[run])))
                time.sleep(_POLL)
                now = time.monotonic()
                for process in [p for p in going if p.popen.poll() is not None]:
                    going.remove(process)
                    if not _end(process, progress, going, console):
                        failed.append(process.run)
                if console.is_terminal and now - looked > _REFRESH:
                    looked = now
                    for process in going:
                        process.edits = max(process.edits_before, process.run.edits_done())
                    live.update(_lines(going, progress, now), refresh=True)
        finally:
            for process in going:  # only after an error or an interruption
                process.popen.terminate()
            for process in going:
                _wait(process.popen)
    return failed


@contextmanager
def _told_to_end() -> Iterator[Callable[[], bool]]:
    """Notes SIGTERM instead of dying of it, which would leave the runs behind.

    An exception out of the handler could come between the start of a run and the note of it. Only a program's main
    thread may handle signals; elsewhere nothing is noted.
    """
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield received.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait(popen: subprocess.Popen[bytes]) -> None:
    """Until a run has ended that was told to; ends it after a while, or at a second interruption."""
    impatient = threading.Timer(_GRACE, popen.kill)
    impatient.start()
    try:
        popen.wait()
    finally:
        popen.kill()  # of a process that has ended this does nothing
        impatient.cancel()


def _kept(run: Run, state: State) -> int:
    """Edits that need not be made again, as far as evaluations tell: the checkpoint may be a few edits off."""
    return run.edits_done() if state is State.CUT else 0


def _start(run: Run, threads: int, edits_before: int) -> Process:
    command = run.command
    run.prepare()
    environment = {**os.environ, THREADS: str(threads)}
    with (run.folder / LOG).open("ab") as log:
        popen = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    return Process(run, popen, time.monotonic(), edits_before, edits_before)


def _end(process: Process, progress: Progress, going: Sequence[Process], console: Console) -> bool:
    """Says how a run ended; gives whether it is complete."""
    run, now = process.run, time.monotonic()
    complete = process.popen.returncode == 0 and run.state() is State.COMPLETE
    process.edits = run.edits_done()
    progress.done += 1
    progress.made += max(0, process.edits - process.edits_before)
    if complete:
        run.tidy()
        what = f"{process.edits} edits"
    else:
        progress.edits -= run.n_edits - max(process.edits, process.edits_before)
        what = f"failed after {process.edits} edits"
    rest = progress.rest(now, going)
    left = f", about {clock(rest)} left" if rest and progress.done < progress.total else ""
    place = f"[{progress.done}/{progress.total}] {run.name}, seed {run.seed}"
    console.print(Text(f"{place}: {what} in {clock(now - process.begun)}{left}"), soft_wrap=True)
    if not complete:
        for line in run.last_lines(LAST_LINES):
            console.print(Text(f"    {line}"), soft_wrap=True)
        console.print(Text(f"    (all of it: {run.folder / LOG})"), soft_wrap=True)
    return complete


def _lines(going: Sequence[Process], progress: Progress, now: float) -> Text:
    lines = [
        f"[{progress.done}/{progress.total}] {p.run.name}, seed {p.run.seed}: {p.edits} of {p.run.n_edits} edits, "
        f"{clock(now - p.begun)}"
        for p in going
    ]
    rest = progress.rest(now, going)
    return Text("\n".join([*lines, *([f"about {clock(rest)} left"] if rest else [])]))


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
