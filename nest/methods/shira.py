"""PEFT's SHiRA: a few weights of each module, drawn at random, are trained themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from nest.errors import InputError
from nest.methods.adapters import adapted, peft_module
from nest.methods.method import Subject, TrainingData, Treated, Watch
from nest.methods.places import (
    Budget,
    Modules,
    budget_of,
    is_transposed,
    linear_modules,
    rank_within,
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
from nest.settings import AtLeastOne, settings
from nest.tuning.config import TuningConfig
from nest.tuning.dialogues import prepare


@settings("the method shira")
class Shira:
    """Train weights at random places of linear layers; everything else is frozen.

    Attributes:
        rank: As many weights of a module are trained as a LoRA of this rank has; with `parameters` it
            plays no part.
        modules: As for `Lora`.
        parameters: As for `Lora`.
        learning_rate: Peak of the schedule.
        selecting: How neurons are found where they are to be counted.
        tuning: How it is trained; its seed also draws the places.
        name: For tables.

    Source: arXiv 2406.13175, the random mask.
    """

    rank: Annotated[int, AtLeastOne] = 1
    modules: Modules = "sites"
    parameters: Budget = None
    learning_rate: Rate = 3e-2
    selecting: SelectionConfig = field(default_factory=SelectionConfig)
    tuning: TuningWithoutRate = field(default_factory=TuningConfig)
    name: str = "shira"

    knob: ClassVar[str] = "learning_rate"
    tried: ClassVar[tuple[float, ...]] = (3e-3, 1e-2, 3e-2, 1e-1)

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
            InputError: PEFT is not installed, a module is no `nn.Linear` or too small, or there is none
                of so few parameters.
        """
        peft, config = peft_module(self.name), self.tuning
        with begun(subject, watch) as watcher:
            shapes = linear_modules(subject, self.modules, self.name)
            for path in shapes:
                if is_transposed(submodule(subject.model, path)):
                    raise InputError(
                        f"the method `{self.name}` adapts nn.Linear alone, and {path} is a transposed "
                        "layer; leave the method out for this model"
                    )
            largest = min(n_in * n_out // (n_in + n_out) for n_in, n_out in shapes.values())
            rank, paths = self.rank, tuple(shapes)
            if self.parameters is None and rank > largest:
                raise InputError(
                    f"rank is {rank}, more weights than a module has; it must be at most {largest} here"
                )
            with watcher.paused():
                budget = budget_of(
                    self.parameters, subject, data, self.selecting, config, self.name, progress
                )
            if budget is not None:
                costs = {path: n_in + n_out for path, (n_in, n_out) in shapes.items()}
                rank, paths = rank_within(costs, budget, largest, self.name)
            course = Course(*prepare(subject.encoder, data.harmful, data.benign, config))
            shape = peft.ShiraConfig(r=rank, target_modules=list(paths))
            shape.mask_fn = _drawn(config.seed)
            # Off is torch's default, of which it warns where nobody has said so.
            unchecked = torch.sparse.check_sparse_tensor_invariants(False)
            with unchecked, adapted(subject.model, shape, seed=config.seed) as adapter:
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
                more = {"rank": rank, "modules": len(paths), "budget": budget}
                result = result_of(loop, adapter.n_parameters, watcher, more)
                yield Treated(subject.model, result, adapter.merged)


def _drawn(seed: int) -> Any:
    """PEFT's random mask, with other places in every module: its own draws the same for each shape."""
    generator = torch.Generator().manual_seed(seed)

    def mask(base_layer: nn.Linear, r: int, **_: Any) -> Tensor:
        weight = base_layer.weight
        chosen = torch.randperm(weight.numel(), generator=generator)[: r * sum(weight.shape)]
        places = torch.zeros(weight.numel(), dtype=weight.dtype)
        places[chosen] = 1.0
        return places.view(weight.shape).to(weight.device)

    return mask
