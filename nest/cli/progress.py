"""How far a stage is: bars on a terminal, and now and then a line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nest.cli.streams import say
from nest.progress import ProgressCallback

SECONDS_BETWEEN_LINES = 10.0


class ProgressLines:
    """A line at most every ten seconds: stage, done of all, rate, time left.

    Args:
        tell: Gets the lines.
        clock: Seconds.
    """

    def __init__(
        self, tell: Callable[[str], None] = say, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tell, self._clock = tell, clock
        self._stage, self._first, self._last = "", 0, 0
        self._began = self._told = clock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = self._clock()
        if stage != self._stage or done < self._last:
            self._stage, self._first, self._began = stage, done, now
        self._last = done
        if now - self._told < SECONDS_BETWEEN_LINES:
            return
        self._told = now
        line = f"{stage}: {done}/{total}"
        rate = (done - self._first) / (now - self._began) if now > self._began else 0.0
        if rate > 0:
            line += f", {rate:.3g}/s, {duration((total - done) / rate)} left"
        self._tell(line)


def duration(seconds: float) -> str:
    """`8 s`, `2 min 05 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@contextmanager
def progress_bars() -> Iterator[ProgressCallback]:
    """Bars on stderr for the time of the block."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks or bars.tasks[tasks[stage]].completed > done:
                tasks[stage] = bars.add_task(stage, total=total, rate="")
            speed = bars.tasks[tasks[stage]].speed
            bars.update(
                tasks[stage],
                completed=done,
                total=total,
                rate="" if speed is None else f"{speed:.1f}/s",
            )

        yield update
