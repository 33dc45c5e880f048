"""One arm in a process of its own, its peak memory on the last line of stdout; see `memory_of`."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks import arms, capturing
from experiments.benchmarks.shapes import TINY, Shape, shape_for

# A tuning step has all its state after the first; a capture's step is two batches of a minute's work.
N_TUNING_STEPS, N_CAPTURE_STEPS = 3, 1


def main(arm: str, device_name: str, arguments: str) -> None:
    """Run the arm for a few steps."""
    torch.set_num_threads(1)
    device, options = torch.device(device_name), json.loads(arguments)
    _run(arm, TINY, device, options)  # imports what it needs, which is no memory of the method's
    gc.collect()
    before = resident() if device.type == "cpu" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _run(arm, shape_for(device, memory=True), device, options)
    print(peak(device) - before)


def peak(device: torch.device) -> int:
    """Most bytes that torch allocated on a GPU, or that this process held on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage's ru_maxrss: it begins at the memory of the process that started this one.
    return _status("VmHWM")


def resident() -> int:
    """Bytes that this process holds now."""
    return _status("VmRSS")


def _run(arm: str, shape: Shape, device: torch.device, options: dict[str, Any]) -> None:
    with {**arms.ARMS, **capturing.ARMS}[arm](shape, device, **options) as made:
        for _ in range(N_TUNING_STEPS if arm in arms.ARMS else N_CAPTURE_STEPS):
            made.step()


def _status(field: str) -> int:
    """A line of Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (kilobytes,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(kilobytes)


if __name__ == "__main__":
    main(*sys.argv[1:])
