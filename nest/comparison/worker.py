"""A worker: a process that runs one task after the other, each in a fork of its own.

    python -m nest.comparison.worker < tasks > outcomes

Each line of the input is a JSON object with `plan` (a TOML file's content as values), `task`, `device`
and `threads`; each line of the output is `{"outcome": ...}`, `{"fault": sentence, "failed": bool}` or
`{"died": signal}`.
A fork a task keeps the peak memory of one from counting for the next, and what kills one from killing
the others; what takes seconds to import is imported once. Worker and fork end when whoever asked is gone.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import traceback
import warnings
from typing import Any


def main() -> None:
    """Serve tasks until the input ends.

    The watch begins before the imports, since they take seconds, and leaves the interpreter's own ending
    out, since that does, too.
    """
    _watch()
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    _import_what_takes_long()
    for line in sys.stdin.buffer:
        _answer(answers, line)


def _answer(answers: int, line: bytes) -> None:
    """Run a task in a fork, and say so where it ends without an answer."""
    if not hasattr(os, "fork"):
        _write(answers, _answer_of(json.loads(line)))
        return
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside a thread; ours sleeps in the system and holds no lock
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _watch()  # threads are not forked
            _write(answers, _answer_of(json.loads(line)))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if status:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        _write(answers, {"died": number})


def _answer_of(asked: dict[str, Any]) -> dict[str, Any]:
    import torch

    from nest.comparison.plan import Plan
    from nest.comparison.task import Task
    from nest.comparison.trial import run_task
    from nest.errors import EngineError, NestError, NoMemoryError

    torch.set_num_threads(asked["threads"])
    try:
        found = run_task(Plan(**asked["plan"]), Task(**asked["task"]), asked["device"])
    except NoMemoryError:
        raise  # as a worker that died for it
    except NestError as fault:
        return {"fault": str(fault), "failed": isinstance(fault, EngineError)}
    return {"outcome": found.to_json()}


def _write(answers: int, answer: dict[str, Any]) -> None:
    content = json.dumps(answer).encode() + b"\n"
    while content:
        content = content[os.write(answers, content) :]


def _watch() -> None:
    threading.Thread(target=_end_with_whoever_asked, daemon=True).start()


def _end_with_whoever_asked() -> None:
    """Wait until the input's other end is closed, which a kill does as well."""
    if hasattr(select, "poll"):
        watched = select.poll()
        watched.register(sys.stdin.fileno(), 0)  # closing is always told
        watched.poll()
        os._exit(1)


def _import_what_takes_long() -> None:
    import peft  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.cluster
    import sklearn.linear_model  # noqa: F401
    import transformers  # noqa: F401

    import nest.comparison.trial  # noqa: F401


if __name__ == "__main__":
    main()
