"""Checkpoints of a tuning: all that the next step depends on, written now and then beside the output."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nest.artifacts.unfinished import Unfinished
from nest.errors import InputError

_FILE = "state.safetensors"


class Every(NamedTuple):
    """How often a checkpoint is written; never where neither is given.

    Attributes:
        seconds: At the end of the first step that is so late after the last checkpoint.
        steps: After so many optimizer steps.
    """

    seconds: float | None = None
    steps: int | None = None

    @staticmethod
    def parse(text: str) -> Every:
        """`60s`, `5m` or `1h`; a number of steps; `never`.

        Raises:
            InputError: something else.
        """
        if text == "never":
            return Every()
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
        if found:
            number, unit = found.groups()
            if unit:
                return Every(seconds=float(number) * {"s": 1, "m": 60, "h": 3600}[unit])
            if number.isdecimal() and int(number) > 0:
                return Every(steps=int(number))
        raise InputError(
            f"--checkpoint-every is {text!r}; it must be a time such as 60s, 5m or 1h, a number of steps "
            "from 1, or never"
        )


ONCE_A_MINUTE = Every(seconds=60.0)


@dataclass(frozen=True)
class TuningState:
    """Where a tuning stands between two steps.

    Attributes:
        step: Optimizer steps done.
        parameters: The update's, as its `snapshot` gives them.
        best: Those of the best step.
        optimizer: The optimizer's tensors, by parameter number and name.
        numbers: The loss curve and what else the loop counts; JSON values.
    """

    step: int
    parameters: list[Tensor]
    best: list[Tensor]
    optimizer: Mapping[str, Tensor]
    numbers: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoint of a run, read when it begins and written while it goes on.

    Args:
        work: Where it is kept.
        every: How often.

    Attributes:
        attempt: Which learning rate is being tried; to begin with, that of the checkpoint.

    Raises:
        InputError: a checkpoint that is damaged.
    """

    def __init__(self, work: Unfinished, every: Every = ONCE_A_MINUTE) -> None:
        self._work, self._every = work, every
        self._written_at, self._written_step = time.monotonic(), 0
        self._state = self._read()
        self.attempt = 0 if self._state is None else int(self._state.numbers["attempt"])

    def read(self) -> TuningState | None:
        """What an earlier run left of this attempt; None where there is nothing."""
        state, self._state = self._state, None
        if state is None or state.numbers["attempt"] != self.attempt:
            self._written_at, self._written_step = time.monotonic(), 0
            return None
        return state

    def _read(self) -> TuningState | None:
        path = self._work.path(_FILE)
        if not path.exists():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as reader:
                tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
                numbers = json.loads(reader.metadata()["numbers"])
            state = TuningState(
                step=int(numbers.pop("step")),
                parameters=_listed(tensors, "parameters"),
                best=_listed(tensors, "best"),
                optimizer={
                    name.removeprefix("optimizer."): value
                    for name, value in tensors.items()
                    if name.startswith("optimizer.")
                },
                numbers=numbers,
            )
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as fault:
            raise InputError(f"{path} is damaged ({fault}); begin anew with --restart") from None
        self._written_step = state.step
        return state

    def due(self, step: int) -> bool:
        """Whether one is to be written after this step."""
        seconds, steps = self._every
        late = seconds is not None and time.monotonic() - self._written_at >= seconds
        return late or (steps is not None and step - self._written_step >= steps)

    def write(self, state: TuningState) -> None:
        """Replace the checkpoint, whole or not at all."""
        from safetensors.torch import save

        tensors = {f"optimizer.{name}": value for name, value in state.optimizer.items()}
        for kind, values in (("parameters", state.parameters), ("best", state.best)):
            tensors |= {f"{kind}.{i}": value for i, value in enumerate(values)}
        # clones: the best step's parameters may be the current ones, and the format shares no memory
        ready = {name: value.detach().cpu().clone() for name, value in tensors.items()}
        numbers = json.dumps({"step": state.step, "attempt": self.attempt, **state.numbers})
        self._work.write(_FILE, save(ready, metadata={"numbers": numbers}))
        self._written_at, self._written_step = time.monotonic(), state.step


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state and the learning rate of an optimizer of one group."""
    tensors: dict[str, Tensor] = {}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    return tensors | {"lr": torch.as_tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64)}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, entry = name.partition(".")
        if entry:
            state.setdefault(int(number), {})[entry] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    group, rate = optimizer.param_groups[0], tensors["lr"]
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(float(rate))
    else:
        group["lr"] = float(rate)


def _listed(tensors: Mapping[str, Tensor], kind: str) -> list[Tensor]:
    count = sum(name.startswith(f"{kind}.") for name in tensors)
    return [tensors[f"{kind}.{i}"] for i in range(count)]
