"""Signals during a run: an edit at hand is finished or dropped, never cut in half."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], Any]


class Interrupted(BaseException):
    """A signal ended the run. Not an `Exception`, so that nothing on the way takes it for an error to go on from.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that shells expect: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


def _handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in SIGNALS}


def _restore(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        # Of a handler that was not set from Python there is nothing to put back.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def interrupt_on_signals() -> dict[int, Any]:
    """Makes the first SIGINT or SIGTERM raise `Interrupted`, and a second one end the process at once.

    Returns:
        The former handlers, for `restore_signals`; none outside the main thread, where handlers cannot be set.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    former = _handlers()

    def stop(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        raise Interrupted(number)

    for number in SIGNALS:
        signal.signal(number, stop)
    return former


def restore_signals(former: Mapping[int, Any]) -> None:
    """Puts back what `interrupt_on_signals` replaced."""
    _restore(former)


@contextmanager
def signals_held() -> Iterator[None]:
    """Puts off a first SIGINT or SIGTERM until the block ends; a second one comes through."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former, waiting = _handlers(), list[int]()

    def hold(number: int, frame: FrameType | None) -> None:
        waiting.append(number)
        _restore(former)  # for a second one

    for number in SIGNALS:
        signal.signal(number, hold)
    try:
        yield
    finally:
        _restore(former)
    if waiting:
        signal.raise_signal(waiting[0])
