"""What methods that train with AdamW share: one loop, one loss, one account of what was done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import nn

from nest.conversations.answers import target_logits
from nest.methods.method import MethodResult, Subject
from nest.methods.watching import Watcher
from nest.progress import ProgressCallback
from nest.tuning.config import MAX_LEARNING_RATE, TuningConfig
from nest.tuning.dialogues import Example
from nest.tuning.loop import TrainingLoop
from nest.tuning.objective import Objective, Supervised
from nest.tuning.trainable import Trainable


def _without_rate(tuning: TuningConfig) -> TuningConfig:
    if tuning.learning_rate is not None:
        raise ValueError(
            f"tuning sets the learning rate {tuning.learning_rate:g}, and the method has one of its own; "
            "leave it out of the tuning settings"
        )
    return tuning


TuningWithoutRate = Annotated[TuningConfig, AfterValidator(_without_rate)]
"""Of a method with a learning rate of its own. Its `update`, `mode`, `layers`, `checkpointing` and
`cache_prefix` play no part."""
Rate = Annotated[float, Field(gt=0, le=MAX_LEARNING_RATE)]


@dataclass(frozen=True)
class Course:
    """What is trained on, and for how long.

    Attributes:
        train: Dialogues.
        validation: Those held back.
        n_steps: Optimizer steps.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    n_steps: int


def device_of(model: nn.Module) -> torch.device:
    """Where batches go: to the model's first parameter."""
    return next(model.parameters()).device


def supervised(subject: Subject, update: Trainable, config: TuningConfig) -> Supervised:
    """The loss that the neurons are trained with, too."""
    model, device = subject.model, device_of(subject.model)
    return Supervised(
        lambda micro_batch: target_logits(model, micro_batch.batch, device),
        update,
        benign_weight=config.benign_weight,
        kl_weight=config.kl_weight,
    )


def train(
    subject: Subject,
    update: Trainable,
    objective: Objective,
    course: Course,
    config: TuningConfig,
    learning_rate: float,
    watcher: Watcher,
    progress: ProgressCallback | None,
) -> TrainingLoop:
    """Train with AdamW; the update is left at the step that the objective keeps.

    Raises:
        ActivationError: the loss or a gradient is not finite.
        InputError: no memory for a single dialogue.
    """
    optimizer = torch.optim.AdamW(
        update.parameters(),
        lr=learning_rate,
        weight_decay=config.weight_decay,
        fused=device_of(subject.model).type in ("cpu", "cuda"),
    )
    loop = TrainingLoop(
        subject.encoder,
        update,
        optimizer,
        objective,
        config,
        course.n_steps,
        micro_batch_size=config.micro_batch_size or config.batch_size,
        progress=progress,
        after_step=watcher.after_step,
    )
    loop.run(course.train, course.validation)
    return loop


def result_of(
    loop: TrainingLoop, n_parameters: int, watcher: Watcher, more: Mapping[str, Any]
) -> MethodResult:
    """What the loop did, and how long it all took."""
    return MethodResult(
        n_parameters,
        tuple(loop.history),
        loop.best_step,
        loop.n_steps,
        watcher.seconds,
        loop.seconds,
        more,
    )
