"""Standard streams as they may be: closed, full, no terminal, or in an encoding of long ago."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def make_usable() -> None:
    """Open what is closed, and let no character be a fault.

    A daemon may start us without streams. Then the next file that is opened would get the number of one,
    and what a library writes to its stderr would land in it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for good
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def is_terminal(stream: Any) -> bool:
    """Whether a stream is there and a terminal."""
    return stream is not None and not stream.closed and bool(stream.isatty())


def say(text: str) -> None:
    """One line on stderr. Work does not end because nobody can be told of it."""
    with suppress(OSError, ValueError):  # a full disk; a stream that was closed under us
        print(text, file=sys.stderr, flush=True)


def keep_result(values: Mapping[str, Any]) -> Path | None:
    """Write a result that could not be printed into a file; None where no disk would take it."""
    text = json.dumps(values, allow_nan=False, default=str, indent=1) + "\n"
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        try:
            with tempfile.NamedTemporaryFile(
                "w", dir=folder, prefix="nest-result-", suffix=".json", delete=False
            ) as file:
                file.write(text)
            return Path(file.name)
        except OSError:
            continue
    return None


def silence_stdout() -> None:
    """Send what stdout still holds nowhere, so that Python does not fail again at its end."""
    with suppress(OSError, ValueError):  # a stream without a number, as tests have them
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
