"""The cluster update: a few neurons, one small shared update a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from nest.errors import InputError
from nest.methods.method import MethodResult, Subject, TrainingData, Treated
from nest.progress import ProgressCallback
from nest.selection.config import SelectionConfig
from nest.selection.select import select_neurons
from nest.selection.selection import NeuronSelection
from nest.tuning.config import TuningConfig
from nest.tuning.tune import tune_update


@dataclass(frozen=True)
class Neurons:
    """Select neurons, train their cluster update, and carry it in the model's rows.

    Attributes:
        selecting: How neurons are found.
        tuning: How the update is trained.
        changed: Makes another selection of it before training, such as a control of random neurons.
        name: For tables.
    """

    selecting: SelectionConfig = field(default_factory=SelectionConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    changed: Callable[[NeuronSelection], NeuronSelection] | None = None
    name: str = "neurons"

    @contextmanager
    def applied(
        self, subject: Subject, data: TrainingData, progress: ProgressCallback | None = None
    ) -> Iterator[Treated]:
        """See `Method.applied`.

        Raises:
            InputError: there are no unsafe and safe prompts to find neurons with.
            SelectionError: no neuron passes the threshold.
        """
        if data.unsafe is None or data.safe is None:
            raise InputError(
                "the method `neurons` needs unsafe and safe prompts to find neurons with"
            )
        selection = select_neurons(
            subject.model,
            subject.encoder,
            unsafe=data.unsafe,
            safe=data.safe,
            sites=subject.sites,
            config=self.selecting,
            progress=progress,
        )
        if self.changed is not None:
            selection = self.changed(selection)
        trained = tune_update(
            subject.model,
            subject.encoder,
            selection,
            harmful=data.harmful,
            benign=data.benign,
            config=self.tuning,
            progress=progress,
        )
        result = MethodResult(
            trained.patch.trainable_parameters,
            trained.history,
            trained.best_step,
            trained.steps,
            trained.seconds,
            {"neurons": selection.n_neurons, "clusters": selection.n_clusters},
        )
        with trained.patch.applied(subject.model) as model:
            yield Treated(model, result)
