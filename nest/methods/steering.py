"""Steering with the refusal direction: nothing is trained, and no weight is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from nest.activations.capture import capture
from nest.activations.steering import adding
from nest.activations.taps import residual_taps
from nest.conversations.answers import target_logits
from nest.errors import InputError
from nest.methods.method import MethodResult, Subject, TrainingData, Treated, Watch
from nest.methods.neurons import required_prompts
from nest.methods.training import device_of
from nest.methods.watching import begun
from nest.progress import ProgressCallback
from nest.settings import Positive, settings
from nest.tuning.config import TuningConfig
from nest.tuning.dialogues import Example, prepare, to_micro_batches
from nest.tuning.loss import tuning_loss


@settings("the method steering")
class Steering:
    """Add the refusal direction after one block, at every token, generated ones too.

        v_l = mean over unsafe prompts - mean over safe prompts, at their last token, after block l

    The block is the one where adding `strength` * v_l gives the lowest loss on the dialogues that `tuning`
    holds back (cross-entropy of refusals and of benign answers, weighted as in `tuning`).

    Attributes:
        strength: What the direction is multiplied with; 1 is the whole way from safe to unsafe.
        tuning: Says which dialogues choose the block, and how they are weighted; nothing is trained.
        name: For tables.

    Source: arXiv 2406.11717, section 2.3, for the direction; 2308.10248 for adding it.
    """

    strength: Annotated[float, Positive] = 0.5
    tuning: TuningConfig = field(default_factory=TuningConfig)
    name: str = "steering"

    knob: ClassVar[str] = "strength"
    tried: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 1.0)

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
            InputError: there are no unsafe and safe prompts, or adding the direction gives no finite
                loss anywhere.
            LayoutError: the model's blocks are not in one list.
        """
        required_prompts(data, self.name, "find a direction with")
        with begun(subject, watch) as watcher:
            _, held_back, _ = prepare(subject.encoder, data.harmful, data.benign, self.tuning)
            directions = refusal_directions(subject, data, self.name, progress)
            losses = []
            for layer, direction in enumerate(directions):
                with adding(subject.model, direction, self.strength, [layer], layout=subject.sites):
                    losses.append(self._loss(subject, held_back))
                if progress:
                    progress("choose a layer", layer + 1, len(directions))
            layer = int(torch.tensor(losses).nan_to_num(torch.inf).argmin())
            if not torch.tensor(losses[layer]).isfinite():
                raise InputError(
                    f"the direction times {self.strength:g} gives no finite loss at any layer; take a "
                    "smaller strength"
                )
            direction = directions[layer]
            with adding(subject.model, direction, self.strength, [layer], layout=subject.sites):
                watcher.step_done()
                more = {"layer": layer, "direction_norm": float(direction.norm()), "losses": losses}
                result = MethodResult(0, seconds=watcher.seconds, more=more)
                yield Treated(subject.model, result)

    @torch.no_grad()
    def _loss(self, subject: Subject, examples: list[Example]) -> float:
        """Mean loss a response token of the steered model, without the KL."""
        total, n_targets = 0.0, sum(example.n_targets for example in examples)
        size = self.tuning.micro_batch_size or self.tuning.batch_size
        for micro_batch in to_micro_batches(examples, size, subject.encoder.pad_id):
            logits, targets, rows = target_logits(
                subject.model, micro_batch.batch, device_of(subject.model)
            )
            benign = torch.tensor([e.benign for e in micro_batch.examples], device=rows.device)
            loss = tuning_loss(
                logits,
                targets,
                benign[rows],
                None,
                benign_weight=self.tuning.benign_weight,
                kl_weight=0.0,
            )
            total += float(loss) / n_targets
        return total


def refusal_directions(
    subject: Subject, data: TrainingData, name: str, progress: ProgressCallback | None
) -> Float[Tensor, "L D"]:
    """For each block the difference of means, at the last token of prompts, after it.

    Raises:
        InputError: there are no unsafe and safe prompts.
    """
    unsafe, safe = required_prompts(data, name, "find a direction with")
    activations = capture(
        subject.model,
        subject.encoder,
        [*unsafe.conversations, *safe.conversations],
        residual_taps(subject.model, layout=subject.sites),
        pool="last",
        progress=progress,
    )
    pooled = torch.stack([torch.tensor(values) for values in activations.pooled])  # (L, B, D)
    return pooled[:, : len(unsafe)].mean(dim=1) - pooled[:, len(unsafe) :].mean(dim=1)
