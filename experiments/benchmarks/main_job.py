"""Wall time and memory of the commands that a newcomer runs; they depend on the machine."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nest import api


def rows() -> list[dict[str, Any]]:
    """Everything, each with its unit and target."""
    return [*help_seconds(), *demo_seconds_and_memory(), *selection_seconds()]


def help_seconds() -> list[dict[str, Any]]:
    """`nest --help`, median of several processes."""
    command = [str(Path(sys.executable).with_name("nest")), "--help"]
    seconds = [
        _timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
        for _ in range(11)
    ]
    return [_row("nest --help", statistics.median(seconds[1:]), "s", "< 0.5")]


def demo_seconds_and_memory() -> list[dict[str, Any]]:
    """`nest demo` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("nest")), "demo", "--out", f"{folder}/demo"]
        seconds = _timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    # At least what this process itself holds (some 0.4 GiB), which Linux hands on to its children.
    gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
    return [
        _row("nest demo, wall time", seconds, "s", "<= 150"),
        _row("nest demo, peak memory", gib, "GiB", "<= 1.5"),
    ]


def selection_seconds() -> list[dict[str, Any]]:
    """Selection on the organism, model loaded already."""
    model, tokenizer = api.load(device="cpu")
    seconds = _timed(
        lambda: api.select(
            model, tokenizer, unsafe="organism:unsafe", safe="organism:safe", z_threshold=2.0
        )
    )
    return [_row("selection of the organism", seconds, "s", "< 20")]


def _row(name: str, value: float, unit: str, target: str) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "target": target}


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
