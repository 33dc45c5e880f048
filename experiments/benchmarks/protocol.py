"""How things are compared: interleaved in one process, medians, and a bootstrap interval.

Every round runs each arm once, in an order that rotates, so that drift of the machine hits all alike.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import bootstrap

REPEATS, WARM_UP = 30, 10
RESAMPLES = 2000

Step = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """One line of the results.

    Attributes:
        id: R1, R2, ...; several lines may share a number and differ in a letter.
        name: What is divided by what.
        ratio: Ours over theirs, of medians.
        ci95: Bootstrap interval of it.
        target: Such as `<= 0.80`.
        gate: `fail` makes the ratio invalid: what was timed did not compute the right thing.
        samples: How many of each.
        note: What a reader has to know.
        figures: The medians, and whatever else was measured.
    """

    id: str
    name: str
    ratio: float
    ci95: tuple[float, float]
    target: str
    gate: Literal["pass", "fail"]
    samples: int
    note: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """`met`, `missed`, or `invalid` where the gate failed."""
        if self.gate == "fail":
            return "invalid"
        sign, bound = self.target.split()
        reached = self.ratio <= float(bound) if sign == "<=" else self.ratio >= float(bound)
        return "met" if reached else "missed"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **asdict(self),
            "ci95": list(self.ci95),
            "figures": dict(self.figures),
            "verdict": self.verdict,
        }


def interleaved(
    arms: Mapping[str, Step],
    device: torch.device,
    *,
    repeats: int = REPEATS,
    warm_up: int = WARM_UP,
    inner: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each arm, `repeats` times, after `warm_up` rounds that do not count.

    Args:
        arms: What to time.
        device: Synchronised before and after each.
        repeats: Rounds that count.
        warm_up: Rounds before them.
        inner: Calls a sample, for what takes microseconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for round_ in range(warm_up + repeats):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            synchronise(device)
            started = time.perf_counter()
            for _ in range(inner):
                arms[name]()
            synchronise(device)
            if round_ >= warm_up:
                seconds[name].append((time.perf_counter() - started) / inner)
    return seconds


def ratio_of(
    ours: Sequence[float], theirs: Sequence[float], seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Ratio of medians and its 95 % bootstrap interval, rounds resampled in pairs."""
    found = bootstrap(
        (np.asarray(ours), np.asarray(theirs)),
        lambda a, b, axis: np.median(a, axis=axis) / np.median(b, axis=axis),
        n_resamples=RESAMPLES,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    return statistics.median(ours) / statistics.median(theirs), (float(low), float(high))


def compared(
    id_: str,
    name: str,
    seconds: Mapping[str, Sequence[float]],
    ours: str,
    theirs: str,
    *,
    target: str,
    gate: bool,
    note: str = "",
) -> Ratio:
    """A line from two arms' times."""
    ratio, ci95 = ratio_of(seconds[ours], seconds[theirs])
    return Ratio(
        id=id_,
        name=name,
        ratio=ratio,
        ci95=ci95,
        target=target,
        gate="pass" if gate else "fail",
        samples=len(seconds[ours]),
        note=note,
        figures={f"{arm} ms": 1e3 * statistics.median(seconds[arm]) for arm in (ours, theirs)},
    )


def memory_of(arm: str, device: torch.device, **arguments: object) -> int:
    """Peak bytes of one arm in a process of its own: weights, state, gradients and activations.

    On a GPU what torch allocated at most; on a CPU the peak of resident memory beyond what the
    process held after the same arm had run on a tiny model (interpreter and libraries).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # this process holds none of what the other one needs
    command = [
        *(sys.executable, "-m", "experiments.benchmarks.memory", arm, str(device)),
        json.dumps(arguments),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.splitlines()[-1])


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
