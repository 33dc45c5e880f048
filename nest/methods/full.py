"""Full fine-tuning: every parameter of the model, embeddings too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from typing import ClassVar

import torch
from torch import Tensor, nn

from nest.methods.method import Subject, TrainingData, Treated, Watch
from nest.methods.training import (
    Course,
    Rate,
    TuningWithoutRate,
    result_of,
    supervised,
    train,
)
from nest.methods.watching import begun
from nest.progress import ProgressCallback
from nest.settings import settings
from nest.tuning.config import TuningConfig
from nest.tuning.dialogues import prepare


@settings("the method full")
class Full:
    """Train all parameters, in the dtype that they have: in 16 bits small steps are rounded away.

    Attributes:
        learning_rate: Peak of the schedule.
        tuning: How they are trained.
        name: For tables.
    """

    learning_rate: Rate = 3e-4
    tuning: TuningWithoutRate = field(default_factory=TuningConfig)
    name: str = "full"

    knob: ClassVar[str] = "learning_rate"
    tried: ClassVar[tuple[float, ...]] = (3e-5, 1e-4, 3e-4, 1e-3)

    @contextmanager
    def applied(
        self,
        subject: Subject,
        data: TrainingData,
        *,
        progress: ProgressCallback | None = None,
        watch: Watch | None = None,
    ) -> Iterator[Treated]:
        """See `Method.applied`."""
        config = self.tuning
        with begun(subject, watch) as watcher, _thawed(subject.model) as whole:
            course = Course(*prepare(subject.encoder, data.harmful, data.benign, config))
            loop = train(
                subject,
                whole,
                supervised(subject, whole, config),
                course,
                config,
                self.learning_rate,
                watcher,
                progress,
            )
            yield Treated(
                subject.model, result_of(loop, whole.n_parameters, watcher, {}), whole.changed
            )


class _Whole:
    """All parameters of a model as the training loop wants them, with what they were."""

    def __init__(self, model: nn.Module) -> None:
        self._named = dict(model.named_parameters())  # tied ones once
        self._originals = self.snapshot()

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._named.values())

    def parameters(self) -> list[nn.Parameter]:
        return list(self._named.values())

    @contextmanager
    def removed(self) -> Iterator[None]:
        trained = self.snapshot()
        self.restore()
        try:
            yield
        finally:
            self.load_snapshot(trained)

    def gradients(self) -> Mapping[str, Tensor]:
        return {name: p.grad for name, p in self._named.items() if p.grad is not None}

    def snapshot(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters()]

    @torch.no_grad()
    def load_snapshot(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.copy_(value)

    def restore(self) -> None:
        self.load_snapshot(self._originals)

    def changed(self) -> dict[str, Tensor]:
        pairs = zip(self._named.items(), self._originals, strict=True)
        return {
            name: parameter.detach().clone()
            for (name, parameter), original in pairs
            if not torch.equal(parameter, original)
        }


@contextmanager
def _thawed(model: nn.Module) -> Iterator[_Whole]:
    """All parameters trainable within; afterwards they, and their gradients, are what they were."""
    held = [
        (parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()
    ]
    whole = _Whole(model)
    try:
        for parameter, _, _ in held:
            parameter.requires_grad_(True)
        yield whole
    finally:
        whole.restore()
        for parameter, flag, grad in held:
            parameter.requires_grad_(flag)
            parameter.grad = grad
