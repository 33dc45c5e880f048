"""What a method is: a context that gives a treated model, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import nn

from nest.conversations.encoders import Encoder
from nest.models.sites import NeuronSite
from nest.progress import ProgressCallback
from nest.prompts.prompt_set import PromptSet
from nest.tuning.loop import StepRecord


@dataclass(frozen=True, eq=False)
class Subject:
    """What a method is tried on.

    Attributes:
        model: Bit for bit as it was after a method's block.
        encoder: Turns prompts into tokens.
        sites: Where its neurons are.
    """

    model: nn.Module
    encoder: Encoder
    sites: tuple[NeuronSite, ...]


@dataclass(frozen=True)
class TrainingData:
    """What a method may learn from.

    Attributes:
        harmful: Prompts with the refusals to give.
        benign: Prompts with their good answers.
        unsafe: Prompts to be refused, for methods that look for neurons or directions first.
        safe: Prompts to be answered, about as many.
    """

    harmful: PromptSet
    benign: PromptSet
    unsafe: PromptSet | None = None
    safe: PromptSet | None = None


@dataclass(frozen=True)
class MethodResult:
    """What a method did.

    Attributes:
        trainable_parameters: Numbers that were trained; 0 for a method that trains nothing.
        history: The loss curve; empty for a method that trains nothing.
        best_step: The step that was kept.
        steps: Optimizer steps done.
        seconds: Wall time of the training loop.
        more: What else is worth a record, as plain values, such as the number of neurons.
    """

    trainable_parameters: int
    history: Sequence[StepRecord] = ()
    best_step: int = 0
    steps: int = 0
    seconds: float = 0.0
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Treated:
    """A model that a method has treated, for the time of its block.

    Attributes:
        model: The subject's model, or a wrapper around it.
        result: What was done.
    """

    model: nn.Module
    result: MethodResult


@runtime_checkable
class Method(Protocol):
    """One way to make a model safer."""

    @property
    def name(self) -> str:
        """For tables."""
        ...

    def applied(
        self, subject: Subject, data: TrainingData, progress: ProgressCallback | None = None
    ) -> AbstractContextManager[Treated]:
        """The treated model for the time of the block; afterwards the subject is as it was.

        Args:
            subject: What is treated.
            data: What may be learned from.
            progress: Called with stage, steps done, steps in all.

        Raises:
            InputError: data or a package that the method needs are missing.
            ActivationError: training broke before any step was good.
        """
        ...
