"""What a method is: a context that gives a treated model, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from nest.conversations.encoders import Encoder
from nest.models.sites import NeuronSite
from nest.progress import ProgressCallback
from nest.prompts.prompt_set import PromptSet
from nest.tuning.config import TuningConfig
from nest.tuning.loop import StepRecord

Watch = Callable[[nn.Module, int, float], None]
"""Is shown the model as it is after so many optimizer steps, in eval mode, and the wall seconds since the
method began: what came before training is in them, the time spent on watching is not."""


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
        complying: Harmful prompts with answers that comply, for methods that learn what to keep away from.
    """

    harmful: PromptSet
    benign: PromptSet
    unsafe: PromptSet | None = None
    safe: PromptSet | None = None
    complying: PromptSet | None = None


@dataclass(frozen=True)
class MethodResult:
    """What a method did.

    Attributes:
        trainable_parameters: Numbers that were trained; 0 for a method that trains nothing.
        history: The loss curve; empty for a method that trains nothing.
        best_step: The step that was kept; 0 where no step was better than none.
        steps: Optimizer steps done.
        seconds: Wall time of the whole method, selection included and watching left out.
        training_seconds: Of it the training loop's.
        more: What else is worth a record, as plain values, such as the number of neurons.
    """

    trainable_parameters: int
    history: Sequence[StepRecord] = ()
    best_step: int = 0
    steps: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    more: Mapping[str, Any] = field(default_factory=dict)


def _no_weights() -> None:
    return None


@dataclass(frozen=True, eq=False)
class Treated:
    """A model that a method has treated, for the time of its block.

    Attributes:
        model: The subject's model, treated.
        result: What was done.
        changes: Gives what `changed` returns.
    """

    model: nn.Module
    result: MethodResult
    changes: Callable[[], dict[str, Tensor] | None] = _no_weights

    def changed(self) -> dict[str, Tensor] | None:
        """Copies of the weights that are not what they were, by their names in the untreated model.

        An adapter is merged: loaded into a copy of the untreated model they give the treated one up to
        rounding. Weights that the model has under two names come under the first. None where the method
        changes no weights.
        """
        return self.changes()


@runtime_checkable
class Method(Protocol):
    """One way to make a model safer; a frozen dataclass of its settings.

    Attributes:
        knob: The setting to tune first, a learning rate or a strength.
        tried: Four values of it that are worth a try, ascending.
    """

    knob: ClassVar[str]
    tried: ClassVar[tuple[float, ...]]

    @property
    def name(self) -> str:
        """For tables."""
        ...

    @property
    def tuning(self) -> TuningConfig:
        """How it trains."""
        ...

    def applied(
        self,
        subject: Subject,
        data: TrainingData,
        *,
        progress: ProgressCallback | None = None,
        watch: Watch | None = None,
    ) -> AbstractContextManager[Treated]:
        """The treated model for the time of the block; afterwards the subject is as it was.

        Args:
            subject: What is treated.
            data: What may be learned from.
            progress: Called with stage, steps done, steps in all.
            watch: Shown the model before anything is done, as step 0, and after every optimizer step; at
                the end, as step 1, where nothing is trained. Where training begins anew with a lower
                rate, steps are counted on. What is learned is the same to the bit without it.

        Raises:
            InputError: data or a package that the method needs are missing.
            ActivationError: training broke before any step was good.
        """
        ...
