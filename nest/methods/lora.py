"""PEFT's LoRA, with the same loss, data order and schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from nest.methods.adapters import adapted, peft_module
from nest.methods.method import Subject, TrainingData, Treated, Watch
from nest.methods.neurons import found_neurons
from nest.methods.places import (
    Budget,
    Modules,
    budget_of,
    is_transposed,
    linear_modules,
    ranks_within,
)
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
from nest.selection.config import SelectionConfig
from nest.selection.selection import NeuronSelection
from nest.settings import AtLeastOne, Positive, settings
from nest.tuning.config import TuningConfig
from nest.tuning.dialogues import prepare


@settings("the method lora")
class Lora:
    """Train a LoRA on linear layers of the subject.

    Attributes:
        rank: Of the adapter; with `parameters` it plays no part.
        alpha: Its output is multiplied with alpha / rank; None takes twice the rank. Adam makes this a
            matter of the learning rate.
        modules: `sites`: the projections that the sites are in, whole ones where they are fused; `mlp`:
            also those that read their neurons; `all`: every linear layer of the blocks.
        parameters: Ranks and modules are chosen to come closest to so many trainable parameters, at
            most a tenth above: a number, or `neurons`, as many as the neurons' update would have, with
            `selecting` and the update of `tuning`. The time to count them is none of the method's.
        rows: `all`, or `selected`: B is trained on the rows of the selected neurons alone, on the
            modules that have such, whatever `modules` says; the others stay zero.
        learning_rate: Peak of the schedule.
        selecting: How neurons are found where they are needed.
        tuning: How it is trained.
        name: For tables.
    """

    rank: Annotated[int, AtLeastOne] = 16
    alpha: Annotated[float, Positive] | None = None
    modules: Modules = "sites"
    parameters: Budget = None
    rows: Literal["all", "selected"] = "all"
    learning_rate: Rate = 1e-2
    selecting: SelectionConfig = field(default_factory=SelectionConfig)
    tuning: TuningWithoutRate = field(default_factory=TuningConfig)
    name: str = "lora"

    knob: ClassVar[str] = "learning_rate"
    tried: ClassVar[tuple[float, ...]] = (1e-3, 3e-3, 1e-2, 3e-2)

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
            InputError: PEFT is not installed, a module is no linear layer, or there is no LoRA of so
                few parameters.
        """
        peft, config = peft_module(self.name), self.tuning
        with begun(subject, watch) as watcher:
            shapes = linear_modules(subject, self.modules, self.name)
            rows: dict[str, Tensor] = {}
            if self.rows == "selected":
                selection = found_neurons(
                    subject,
                    data,
                    self.selecting,
                    self.name,
                    tuning=self.tuning,
                    progress=progress,
                )
                rows = _outputs(selection)
                shapes = {path: shapes[path] for path in rows}
            costs = {
                path: n_in + (rows[path].numel() if path in rows else n_out)
                for path, (n_in, n_out) in shapes.items()
            }
            with watcher.paused():
                budget = budget_of(
                    self.parameters, subject, data, self.selecting, config, self.name, progress
                )
            ranks = (
                dict.fromkeys(costs, self.rank)
                if budget is None
                else ranks_within(costs, budget, self.name)
            )
            course = Course(*prepare(subject.encoder, data.harmful, data.benign, config))
            transposed = is_transposed(submodule(subject.model, next(iter(ranks))))
            shape = self._shape(peft, ranks, transposed)
            kept = {path: rows[path] for path in ranks if path in rows}
            with adapted(subject.model, shape, seed=config.seed, rows=kept) as adapter:
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
                more = {"rank": max(ranks.values()), "modules": len(ranks), "budget": budget}
                result = result_of(loop, adapter.n_parameters, watcher, more)
                yield Treated(subject.model, result, adapter.merged)

    def _shape(self, peft: Any, ranks: dict[str, int], transposed: bool) -> Any:
        alphas = {path: self.alpha or 2 * rank for path, rank in ranks.items()}
        first = next(iter(ranks))
        one_rank = len(set(ranks.values())) == 1
        return peft.LoraConfig(
            r=ranks[first],
            lora_alpha=alphas[first],
            rank_pattern={} if one_rank else ranks,
            alpha_pattern={} if one_rank else alphas,
            target_modules=list(ranks),
            lora_dropout=0.0,
            fan_in_fan_out=transposed,
        )


def _outputs(selection: NeuronSelection) -> dict[str, Tensor]:
    """For each module the outputs that are selected neurons, of all sites in it."""
    found: dict[str, list[Tensor]] = {}
    for part in selection.sites:
        found.setdefault(part.site.module, []).append(part.neurons + part.site.offset)
    return {path: torch.cat(parts) for path, parts in found.items()}
