"""A method's clock, and the look that whoever watches takes at the model: none of it leaves a trace."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from nest.methods.method import Subject, Watch
from nest.models.modes import eval_mode


class Watcher:
    """Counts a method's seconds and steps, and shows its model to a watch.

    Args:
        model: What is shown.
        watch: Whom to; None shows nothing.
    """

    def __init__(self, model: nn.Module, watch: Watch | None) -> None:
        self._model, self._watch = model, watch
        self._step, self._paused = 0, 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the method began, pauses left out."""
        return time.monotonic() - self._started - self._paused

    @property
    def after_step(self) -> Callable[[], float] | None:
        """For the training loop; None where nobody watches."""
        return None if self._watch is None else self.step_done

    def step_done(self) -> float:
        """Show the model after one more step; the seconds that it took."""
        self._step += 1
        return self.look()

    def look(self) -> float:
        """Show the model as it is; the seconds that it took."""
        if self._watch is None:
            return 0.0
        seconds, before = self.seconds, self._paused
        with self.paused(), _untouched(self._model):
            self._watch(self._model, self._step, seconds)
        return self._paused - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What takes place in the block is none of the method's time."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - started


@contextmanager
def begun(subject: Subject, watch: Watch | None) -> Iterator[Watcher]:
    """A method's block: the model in eval mode, the clock running, the untreated model shown."""
    with eval_mode(subject.model):
        watcher = Watcher(subject.model, watch)
        watcher.look()
        yield watcher


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Gradients, flags, modes and the state of all random numbers are afterwards what they were."""
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p, _, _ in parameters if p.is_cuda}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            for parameter, _, _ in parameters:
                parameter.grad = None
            model.eval()
            yield
    finally:
        for parameter, grad, flag in parameters:
            parameter.requires_grad_(flag)
            parameter.grad = grad
        for module, training in modes:
            module.training = training
        random.setstate(python)
        np.random.set_state(numpy)
