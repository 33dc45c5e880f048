"""SIGTERM and SIGHUP end a run as Ctrl-C does: what is half-written is removed, what is done is kept."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_INTERRUPTED = 130
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


SECONDS_UNTIL_ASKED_AGAIN = 0.02
"""While something is imported, a stop waits so long before it looks whether that is done."""


class Stopped(KeyboardInterrupt):
    """A signal that asks the run to end."""


class Stopper:
    """The handler of these signals; raises `Stopped` at the first.

    A KeyboardInterrupt can get lost: an import that it hits may hide it behind an error of its own, or
    behind nothing at all. So it is remembered here, and `check` raises it again.

    Attributes:
        received: The signal that came, if one did.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:  # pressed again: whoever waits no longer wants cleaning up
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return  # schedulers and closing terminals send several
        self.received = number
        self._stop(number, frame)

    def _stop(self, _number: int, frame: FrameType | None) -> None:
        """Raise, but not out of an import: a library in C++ may abort where one comes through it."""
        if not _is_importing(frame) or not hasattr(signal, "setitimer"):
            raise Stopped
        signal.signal(signal.SIGALRM, self._stop)
        signal.setitimer(signal.ITIMER_REAL, SECONDS_UNTIL_ASKED_AGAIN)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Handle the signals for the time of the block; those that are ignored (nohup) stay so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopper = Stopper()
    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, stopper)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def received() -> int | None:
    """The signal that asked this run to end, whatever became of the exception."""
    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    handlers = [signal.getsignal(number) for number in numbers]
    stoppers = [handler for handler in handlers if isinstance(handler, Stopper)]
    return stoppers[0].received if stoppers else None


def check() -> None:
    """Raise a stop that got lost.

    Raises:
        Stopped: a signal came.
    """
    if received() is not None:
        raise Stopped


def exit_code() -> int:
    """128 and the number of the signal, as shells have it."""
    number = received()
    return EXIT_INTERRUPTED if number is None else 128 + number
