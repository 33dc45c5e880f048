"""Folding in memory against PEFT's `merge_and_unload`, from a model on which both are ready to go."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch

from experiments.benchmarks.arms import adapted_by_lora
from experiments.benchmarks.gates import fill
from experiments.benchmarks.protocol import REPEATS, WARM_UP
from experiments.benchmarks.shapes import Shape
from nest.tuning.update import trainable


def fold_times(shape: Shape, device: torch.device) -> tuple[dict[str, list[float]], bool]:
    """Seconds of both, and whether the folded model computes exactly what the trained one did."""
    model = shape.model(device)
    batch = shape.micro_batch().batch.input_ids.to(device)
    with trainable(model, shape.selection(model)) as update:
        fill(update)
        with torch.no_grad():
            trained = model(batch).logits
        patch = update.patch()
    plain = shape.model(device)
    seconds: dict[str, list[float]] = {"nest": [], "lora": []}
    exact = True
    for round_ in range(WARM_UP + REPEATS):
        adapted: Any = adapted_by_lora(copy.deepcopy(plain), initialised=False)
        arms = {"nest": lambda: patch.fold_into(model), "lora": adapted.merge_and_unload}
        for name in ("nest", "lora") if round_ % 2 else ("lora", "nest"):
            took = _timed(device, arms[name])
            if round_ >= WARM_UP:
                seconds[name].append(took)
        if round_ == 0:
            with torch.no_grad():
                exact = torch.equal(model(batch).logits, trained)
        patch.revert(model)
    same = all(
        torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )
    return seconds, exact and same


def _timed(device: torch.device, action: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
