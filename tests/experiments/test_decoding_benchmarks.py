"""The benchmarks of drawn answers and of requests in flight, and gates that fail when they should."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from experiments.benchmarks import decoding, ratios, serving
from experiments.benchmarks.shapes import Shape
from nest.generation.sampling import Sampling

CPU = torch.device("cpu")
SMALL = Shape(16, 24, 2, 2, 1, 40, torch.float32, 2, 8, 3, 3, 2)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"CPU_ANSWERS": 12, "SHORTEST": 3, "LONGEST": 9, "NEW_TOKENS": 5, "REPEATS": 2}
    for name, value in {**values, "CPU_BATCH_SIZES": (2, 4)}.items():
        monkeypatch.setattr(decoding, name, value)
    for name, value in {
        "N_REQUESTS": 6,
        "IN_FLIGHT": 3,
        "SERVICE_SECONDS": 0.01,
        "REPEATS": 2,
    }.items():
        monkeypatch.setattr(serving, name, value)


@pytest.mark.parametrize("n", [1, 3])
def test_drawn_answers(n: int) -> None:
    sampling = Sampling(temperature=1.0, n=n, max_new_tokens=5)
    seconds, gate, note = decoding.sampling_times(SMALL, CPU, sampling, decoding.Load.for_(CPU))
    assert gate and f"{n} answers to each of {12 // n} prompts" in note
    assert {name: len(values) for name, values in seconds.items()} == {"nest": 2, "generate": 2}


def test_answers_that_hang_on_the_batch_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    real = decoding.StaticEngine

    class Other(real):  # type: ignore[misc, valid-type]
        def generate(self, *arguments: Any, **named: Any) -> Iterator[Any]:
            for one in super().generate(*arguments, **named):
                first = self._batch_size % 40
                yield one._replace(token_ids=(first, *one.token_ids[1:]))

    monkeypatch.setattr(decoding, "StaticEngine", Other)
    sampling = Sampling(temperature=1.0, max_new_tokens=5)
    assert not decoding.sampling_times(SMALL, CPU, sampling, decoding.Load.for_(CPU))[1]


def test_answers_of_another_distribution_fail() -> None:
    assert decoding._are_alike([-3.0, -3.2, -2.9], [-3.1, -3.0, -2.8])
    assert not decoding._are_alike([-3.0, -3.2, -2.9], [-2.0, -1.9, -2.1])


def test_all_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratios, "shape_for", lambda _device: SMALL)
    lines = ratios.r11(CPU)
    assert [line.id for line in lines] == ["R11", "R11b", "R11c", "R11d", "R11e"]
    assert all(line.gate == "pass" for line in lines)
    assert ratios.CPU["R11"] is ratios.r11
