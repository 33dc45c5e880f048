"""Learned masks over MLP rows: PEFT's IA3 on the projections that the sites are in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import ClassVar

from nest.methods.adapters import adapted, peft_module
from nest.methods.method import Subject, TrainingData, Treated, Watch
from nest.methods.places import is_transposed, linear_modules
from nest.methods.training import (
    Course,
    Rate,
    TuningWithoutRate,
    result_of,
    supervised,
    train,
)
from nest.methods.watching import begun
from nest.models.wrappers import submodule
from nest.progress import ProgressCallback
from nest.settings import settings
from nest.tuning.config import TuningConfig
from nest.tuning.dialogues import prepare


@settings("the method masks")
class Masks:
    """Train one factor a row of the sites' projections, from one on.

    It is PEFT's IA3 with the projections as ordinary modules (none of its `feedforward_modules`), so
    that outputs are scaled: a row, and its bias, times a learned number. The factors may be negative or
    above one; nothing makes them sparse. Of a fused projection every row has one.

    Attributes:
        learning_rate: Peak of the schedule.
        tuning: How they are trained.
        name: For tables.

    Source: arXiv 2205.05638.
    """

    learning_rate: Rate = 1e-1
    tuning: TuningWithoutRate = field(default_factory=TuningConfig)
    name: str = "masks"

    knob: ClassVar[str] = "learning_rate"
    tried: ClassVar[tuple[float, ...]] = (1e-2, 3e-2, 1e-1, 3e-1)

    @contextmanager
    def applied(
        self,
        subject: Subject,
        data: TrainingData,
        *,
        progress: ProgressCallback | None = None,
        watch: Watch | None = None,
    ) -> Iterator[Treated]:
        """See `Method.applied`.

        Raises:
            InputError: PEFT is not installed, or a site's module is no linear layer.
        """
        peft, config = peft_module(self.name), self.tuning
        with begun(subject, watch) as watcher:
            paths = list(linear_modules(subject, "sites", self.name))
            transposed = is_transposed(submodule(subject.model, paths[0]))
            course = Course(*prepare(subject.encoder, data.harmful, data.benign, config))
            shape = peft.IA3Config(
                target_modules=paths, feedforward_modules=[], fan_in_fan_out=transposed
            )
            with adapted(subject.model, shape, seed=config.seed) as adapter:
                loop = train(
                    subject,
                    adapter,
                    supervised(subject, adapter, config),
                    course,
                    config,
                    self.learning_rate,
                    watcher,
                    progress,
                )
                result = result_of(loop, adapter.n_parameters, watcher, {"modules": len(paths)})
                yield Treated(subject.model, result, adapter.merged)
