"""Tasks spread over worker processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from queue import SimpleQueue
from typing import IO, Any

from nest.comparison.task import Outcome, Task
from nest.errors import EngineError, InputError

COMMAND = (sys.executable, "-m", "nest.comparison.worker")
TRIES = 2
"""A worker that dies is replaced, and its task run once more."""


class Workers:
    """So many processes, each with a device and a share of the cores.

        with Workers(plan_values, devices=["cpu", "cpu"]) as workers:
            for task, outcome in workers.run(tasks): ...

    Args:
        plan: The plan's values, as JSON takes them.
        devices: One worker each.
        threads: Of torch, a worker.
    """

    def __init__(self, plan: dict[str, Any], devices: Sequence[str], threads: int = 1) -> None:
        self._plan, self._threads = plan, threads
        self._stack = ExitStack()
        self._free: SimpleQueue[_Worker] = SimpleQueue()
        self._deaths: SimpleQueue[str] = SimpleQueue()
        self._workers = [_Worker(device) for device in devices]

    def __enter__(self) -> Workers:
        for worker in self._workers:
            self._free.put(worker)
            self._stack.callback(worker.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(
        self,
        tasks: Sequence[Task],
        beat: Callable[[], None] = lambda: None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> Iterator[tuple[Task, Outcome | str]]:
        """Outcomes in the order in which they are there; where a worker died twice over a task, how.

        Args:
            tasks: Each is run once.
            beat: Called at least every half second.
            warn: Told of workers that died over a run that is tried once more.

        Raises:
            InputError: a world or judge is such that the comparison cannot go on.
            EngineError: what judges failed.
        """
        if not tasks:
            return
        pool = ThreadPoolExecutor(len(self._workers))
        pending: set[Future[tuple[Task, Outcome | str]]] = set()
        try:
            left = iter(tasks)
            for task in left:
                pending.add(pool.submit(self._one, task))
                if len(pending) == len(self._workers):
                    break
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                beat()
                while not self._deaths.empty():  # told by the caller's own thread
                    warn(self._deaths.get())
                for future in done:
                    for task in left:
                        pending.add(pool.submit(self._one, task))
                        break
                    yield future.result()
        finally:
            for future in pending:
                future.cancel()
            for worker in self._workers if pending else ():  # whatever they are at
                worker.close()
            pool.shutdown(wait=True)

    def _one(self, task: Task) -> tuple[Task, Outcome | str]:
        worker, how = self._free.get(), ""
        try:
            for tries_left in reversed(range(TRIES)):
                answer = worker.ask(
                    {
                        **{"plan": self._plan, "task": task.to_json()},
                        **{"device": worker.device, "threads": self._threads},
                    }
                )
                if "outcome" in answer:
                    return task, Outcome.from_json(answer["outcome"])
                if "fault" in answer:
                    kind = EngineError if answer["failed"] else InputError
                    raise kind(str(answer["fault"]))
                how = _told(answer)
                if tries_left:
                    self._deaths.put(
                        f"{task.name}: its worker died ({how}); the run is tried once more"
                    )
            return task, how
        finally:
            self._free.put(worker)


class _Worker:
    """One process, begun when it is first asked."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._closed = False

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer; `died` where the process ends without one."""
        try:
            process = self._begun()
            self._forget_errors()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (OSError, ValueError):
            line = b""
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer if "died" not in answer else {**answer, "said": self._last_words()}
        code = None
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):  # its pipes are closed before it is gone
                code = self._process.wait(timeout=1.0)
        said = self._last_words()
        self._end()
        return {"died": -code if code is not None and code < 0 else 0, "said": said}

    def close(self) -> None:
        """End it, whatever it is at."""
        self._closed = True
        self._end()

    def _begun(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise OSError("closed")
        if self._process is None:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C is ours to hear
            )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
        errors, self._errors = self._errors, None
        if errors is not None:
            errors.close()

    def _forget_errors(self) -> None:
        """What earlier tasks said is none of the next one's."""
        if self._errors is not None:
            self._errors.seek(0)
            self._errors.truncate()

    def _last_words(self) -> str:
        if self._errors is None or self._errors.closed:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:200] if lines else ""


def _told(answer: dict[str, Any]) -> str:
    number = answer.get("died") or 0
    how = f"signal {number}" if number else "it ended by itself"
    said = answer.get("said")
    return f"{how}: {said}" if said else how
