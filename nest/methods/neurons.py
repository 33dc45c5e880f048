"""The cluster update: a few neurons, one small shared update a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import field, replace
from typing import Annotated, ClassVar

from pydantic import model_validator
from torch import Tensor

from nest.errors import InputError, NoImprovementError
from nest.methods.method import MethodResult, Subject, TrainingData, Treated, Watch
from nest.methods.watching import begun
from nest.progress import ProgressCallback
from nest.prompts.prompt_set import PromptSet
from nest.scoring.find import find_neurons
from nest.selection.config import Control, Scorer, SelectionConfig, UpdateForm
from nest.selection.selection import NeuronSelection
from nest.settings import Positive, settings
from nest.tuning.config import TuningConfig
from nest.tuning.tune import Training, tune_update


@settings("the method neurons")
class Neurons:
    """Select neurons, train their cluster update, and carry it in the model's rows.

    Attributes:
        selecting: How neurons are found.
        tuning: How the update is trained.
        rate_factor: What the automatic learning rate is multiplied with; a learning rate in `tuning` is
            taken instead.
        update: Form of the update; None takes that of `tuning`.
        scorer: How neurons are scored; None takes that of `selecting`.
        control: Train a selection of the same size that says nothing; `shuffled_labels` is for the
            scorers probe and contrast, which alone look at labels.
        separate: Every neuron is a cluster of its own: a trainable row each, as in SN-Tune. It is in
            the shared form, since loadings would add nothing.
        name: For tables.
    """

    selecting: SelectionConfig = field(default_factory=SelectionConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    rate_factor: Annotated[float, Positive] = 1.0
    update: UpdateForm | None = None
    scorer: Scorer | None = None
    control: Control | None = None
    separate: bool = False
    name: str = "neurons"

    knob: ClassVar[str] = "rate_factor"
    tried: ClassVar[tuple[float, ...]] = (0.25, 0.5, 1.0, 2.0)

    @model_validator(mode="after")
    def _separate_is_shared(self) -> Neurons:
        if self.separate and self.update == "loaded":
            raise ValueError(
                "separate is true with update = 'loaded'; a row of its own needs no loading, leave "
                "update out"
            )
        return self

    @model_validator(mode="after")
    def _labels_are_looked_at(self) -> Neurons:
        scorer = self.scorer or self.selecting.scorer
        if self.control == "shuffled_labels" and scorer not in ("probe", "contrast"):
            raise ValueError(
                f"control is shuffled_labels and scorer {scorer or 'left open (gradient)'}, which looks at "
                "no labels; choose scorer = 'probe' or 'contrast'"
            )
        return self

    @property
    def trained(self) -> TuningConfig:
        """How the update is trained, in its form; a start that the form has not is left open."""
        form: UpdateForm = "shared" if self.separate else self.update or self.tuning.update
        start = self.tuning.start if form == "loaded" else None
        return replace(self.tuning, update=form, start=start)

    @contextmanager
    def applied(
        self,
        subject: Subject,
        data: TrainingData,
        *,
        progress: ProgressCallback | None = None,
        watch: Watch | None = None,
    ) -> Iterator[Treated]:
        """See `Method.applied`. Where no step lowers the validation loss the model stays as it is.

        Raises:
            InputError: there are no unsafe and safe prompts to find neurons with.
            SelectionError: no neuron passes the threshold.
        """
        model = subject.model
        selecting = replace(self.selecting, scorer=self.scorer or self.selecting.scorer)
        with begun(subject, watch) as watcher:
            selection = found_neurons(
                subject,
                data,
                selecting,
                self.name,
                tuning=self.tuning,
                control=self.control,
                progress=progress,
            )
            treatment: AbstractContextManager[object] = nullcontext()
            best_step = 0
            try:
                trained = tune_update(
                    model,
                    subject.encoder,
                    selection.separated() if self.separate else selection,
                    harmful=data.harmful,
                    benign=data.benign,
                    config=self.trained,
                    progress=progress,
                    rate_factor=self.rate_factor,
                    after_step=watcher.after_step,
                )
            except NoImprovementError as fault:  # as of every other method: an update of nothing
                done: Training = fault.training
            else:
                done, best_step = trained, trained.best_step
                treatment = trained.patch.applied(model)
            kept = done.selection
            with treatment:
                result = MethodResult(
                    done.trainable_parameters,
                    done.history,
                    best_step,
                    done.steps,
                    watcher.seconds,
                    done.seconds,
                    {"neurons": kept.n_neurons, "clusters": kept.n_clusters},
                )
                names = dict.fromkeys(part.site.parameter for part in kept.sites)

                def changed() -> dict[str, Tensor]:
                    state = model.state_dict()
                    return {name: state[name].detach().clone() for name in names}

                yield Treated(model, result, changed)


def found_neurons(
    subject: Subject,
    data: TrainingData,
    selecting: SelectionConfig,
    name: str,
    *,
    tuning: TuningConfig,
    control: Control | None = None,
    progress: ProgressCallback | None = None,
) -> NeuronSelection:
    """The neurons that a tuning on this data is for.

    Raises:
        InputError: there are no such prompts.
        SelectionError: no neuron passes the threshold.
    """
    unsafe, safe = required_prompts(data, name, "find neurons with")
    return find_neurons(
        subject.model,
        subject.encoder,
        sites=subject.sites,
        config=selecting,
        unsafe=unsafe,
        safe=safe,
        harmful=data.harmful,
        benign=data.benign,
        tuning=tuning,
        control=control,
        progress=progress,
    )


def required_prompts(data: TrainingData, name: str, purpose: str) -> tuple[PromptSet, PromptSet]:
    """The unsafe and the safe prompts.

    Raises:
        InputError: one of both is missing.
    """
    if data.unsafe is None or data.safe is None:
        raise InputError(f"the method `{name}` needs unsafe and safe prompts to {purpose}")
    return data.unsafe, data.safe
