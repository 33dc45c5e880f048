"""The tuning stage: supervised fine-tuning of a cluster update with everything else frozen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nest.errors import ActivationError
from nest.models.chat import Batch, Encoder, logits_of, run_model
from nest.patches.patch import NeuronPatch
from nest.prompts.prompt_set import PromptSet
from nest.selection.selection import NeuronSelection
from nest.tuning.config import TuningConfig
from nest.tuning.dialogues import (
    Example,
    encode_dialogues,
    epochs_of_batches,
    split_validation,
    steps_per_epoch,
    to_micro_batches,
)
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.update import ClusterUpdate, trainable

ProgressCallback = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StepRecord:
    """One point of the loss curve.

    Attributes:
        step: Optimizer steps done.
        train_loss: Mean since the last record; None before the first step.
        validation_loss: On the held-back dialogues.
        learning_rate: Of the last step.
    """

    step: int
    train_loss: float | None
    validation_loss: float
    learning_rate: float


@dataclass(frozen=True)
class TuningResult:
    """What tuning gives.

    Attributes:
        patch: The update of the best step.
        history: The loss curve.
        best_step: Step with the lowest validation loss; 0 means that no step beat the base.
        steps: Optimizer steps done.
        seconds: Wall time of the training loop.
        tokens_per_second: Tokens, padding left out, through training per second.
    """

    patch: NeuronPatch
    history: tuple[StepRecord, ...]
    best_step: int
    steps: int
    seconds: float
    tokens_per_second: float


def tune_update(
    model: nn.Module,
    encoder: Encoder,
    selection: NeuronSelection,
    *,
    harmful: PromptSet,
    benign: PromptSet,
    config: TuningConfig,
    provenance: dict[str, Any] | None = None,
    progress: ProgressCallback | None = None,
) -> TuningResult:
    """Train a cluster update to refuse harmful prompts and to go on answering benign ones.

    The loss is the cross-entropy of refusals, plus that of benign answers, plus KL(base || tuned) on
    benign answers, each a mean over its kind's response tokens weighted by the kind's share of tokens.
    When this returns, the model is bit for bit as it was: fold the patch in to use it.

    Args:
        model: The model that the selection was made on.
        encoder: Turns dialogues into tokens.
        selection: The neurons.
        harmful: Prompts with the refusals to give.
        benign: Prompts with their good answers.
        config: How.
        provenance: Goes into the patch, beside what tuning itself records.
        progress: Called with stage, steps done, steps in all.

    Raises:
        InputError: dialogues that cannot be trained on.
        SelectionError: the selection is of another model.
        ActivationError: the loss or the gradient is not a finite number.

    Source: arXiv 2602.16835, section 3.5; the KL term after arXiv 2601.23143.
    """
    train, validation = split_validation(
        encode_dialogues(encoder, harmful, benign=False),
        encode_dialogues(encoder, benign, benign=True),
        share=config.validation,
        seed=config.seed,
    )
    n_steps = math.ceil(config.epochs * steps_per_epoch(len(train), config.batch_size))
    n_steps = min(n_steps, config.max_steps or n_steps)
    training = [module for module in model.modules() if module.training]
    with trainable(model, selection, update=config.update, seed=config.seed) as update:
        try:
            model.eval()  # dropout would be noise on top of a frozen model
            loop = _Loop(model, encoder, update, config, n_steps, progress)
            loop.run(train, validation)
        finally:
            for module in training:
                module.training = True
        patch = update.patch(
            {
                **(provenance or {}),
                "tuning": {
                    "config": asdict(config),
                    "prompts": {"harmful": harmful.to_manifest(), "benign": benign.to_manifest()},
                    "steps": n_steps,
                    "best_step": loop.best_step,
                    "best_validation_loss": loop.best_loss,
                    "history": [asdict(record) for record in loop.history],
                },
                "selection": dict(selection.provenance),
            }
        )
    return TuningResult(
        patch=patch,
        history=tuple(loop.history),
        best_step=loop.best_step,
        steps=n_steps,
        seconds=loop.seconds,
        tokens_per_second=loop.n_tokens / max(loop.seconds, 1e-9),
    )


class _Loop:
    """Steps, validation and the best step; the update is left at the best step."""

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoder,
        update: ClusterUpdate,
        config: TuningConfig,
        n_steps: int,
        progress: ProgressCallback | None,
    ) -> None:
        self.model, self.encoder, self.update, self.config = model, encoder, update, config
        self.n_steps, self.progress = n_steps, progress
        self.device = update.sites[0].weight.device
        self.optimizer = NeuronAdamW(
            update, lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, n_steps, config.warmup)
        )
        self.history: list[StepRecord] = []
        self.best_step, self.best_loss = 0, math.inf
        self.n_tokens, self.seconds = 0, 0.0

    def run(self, train: Sequence[Example], validation: Sequence[Example]) -> None:
        """All steps, from the base model on."""
        started = time.monotonic()
        best = self.update.packed.detach().clone()
        self._record(0, None, validation)
        batches = epochs_of_batches(train, self.config.batch_size, seed=self.config.seed)
        losses: list[float] = []
        for step in range(1, self.n_steps + 1):
            losses.append(self._step(next(batches), step))
            if step % self.config.validate_every == 0 or step == self.n_steps:
                if self._record(step, sum(losses) / len(losses), validation):
                    best = self.update.packed.detach().clone()
                losses = []
            if self.progress:
                self.progress("tune", step, self.n_steps)
        self.update.load_values(best)
        self.seconds = time.monotonic() - started

    def _record(self, step: int, train_loss: float | None, validation: Sequence[Example]) -> bool:
        """Note a validation loss; true where it is the lowest so far."""
        loss = self._validation_loss(validation)
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.history.append(StepRecord(step, train_loss, loss, rate))
        better = loss < self.best_loss
        if better:
            self.best_loss, self.best_step = loss, step
        return better

    def _step(self, examples: Sequence[Example], step: int) -> float:
        """One optimizer step over its micro-batches; the loss before it."""
        micro_batches = to_micro_batches(
            examples, self.config.micro_batch_size, self.encoder.pad_id
        )
        n_targets = sum(int(batch.completion_mask.sum()) for batch, _ in micro_batches)
        base = self._base_log_probs(micro_batches)
        self.optimizer.zero_grad()
        total = 0.0
        for (batch, benign), expected in zip(micro_batches, base, strict=True):
            loss = self._loss(batch, benign, expected) / n_targets
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            self.n_tokens += int(batch.attention_mask.sum())
        self._check_finite(total, step)
        if self.config.clip > 0:
            nn.utils.clip_grad_norm_(self.update.parameters(), self.config.clip)
        self.optimizer.step()
        self.schedule.step()
        return total

    def _check_finite(self, loss: float, step: int) -> None:
        bad = [name for name, g in self.update.gradients().items() if not bool(g.isfinite().all())]
        if bad or not math.isfinite(loss):
            where = f" and the gradient at {', '.join(bad)}" if bad else ""
            raise ActivationError(
                f"at step {step} the loss is {loss}{where}: not finite numbers. Lower the learning rate "
                "(--learning-rate) or tune in --dtype float32; nothing was written"
            )

    @torch.no_grad()
    def _validation_loss(self, validation: Sequence[Example]) -> float:
        micro_batches = to_micro_batches(
            validation, self.config.micro_batch_size, self.encoder.pad_id
        )
        base = self._base_log_probs(micro_batches)
        n_targets = sum(int(batch.completion_mask.sum()) for batch, _ in micro_batches)
        losses = [
            float(self._loss(batch, benign, expected))
            for (batch, benign), expected in zip(micro_batches, base, strict=True)
        ]
        return sum(losses) / n_targets

    @torch.no_grad()
    def _base_log_probs(
        self, micro_batches: Sequence[tuple[Batch, list[bool]]]
    ) -> list[Float[Tensor, "N V"] | None]:
        """The base model's predictions at benign targets; None where they are not asked for."""
        if self.config.kl_weight == 0.0:
            return [None] * len(micro_batches)
        found: list[Tensor | None] = []
        with self.update.removed():
            for batch, benign in micro_batches:
                if not any(benign):
                    found.append(None)
                    continue
                rows = torch.tensor(benign)
                logits, _, _ = self._targets(batch, rows)
                found.append(logits.float().log_softmax(-1))
        return found

    def _loss(
        self, batch: Batch, benign: list[bool], base: Float[Tensor, "N V"] | None
    ) -> Float[Tensor, ""]:
        """Summed over the batch's response tokens."""
        everything = torch.ones(len(benign), dtype=torch.bool)
        logits, targets, rows = self._targets(batch, everything)
        is_benign = torch.tensor(benign, device=logits.device)[rows]  # (N,)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")  # (N,)
        loss = torch.where(is_benign, self.config.benign_weight * losses, losses).sum()
        if base is not None:
            tuned = logits[is_benign].float().log_softmax(-1)
            loss = loss + self.config.kl_weight * (base.exp() * (base - tuned)).sum()
        return loss

    def _targets(
        self, batch: Batch, keep: Bool[Tensor, " B"]
    ) -> tuple[Float[Tensor, "N V"], Tensor, Tensor]:
        """Logits that predict the kept rows' response tokens, those tokens, and their rows."""
        ids = batch.input_ids[keep].to(self.device)
        mask = batch.attention_mask[keep].to(self.device)
        wanted = batch.completion_mask[keep][:, 1:].to(self.device)  # (B, T - 1)
        logits = logits_of(run_model(self.model, ids, mask, use_cache=False))[:, :-1]
        rows = wanted.nonzero()[:, 0].to(logits.device)
        return logits[wanted.to(logits.device)], ids[:, 1:][wanted].to(logits.device), rows


def learning_rate_factor(step: int, n_steps: int, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then a cosine to zero."""
    n_warmup = round(warmup * n_steps)
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    done = (step - n_warmup) / max(1, n_steps - n_warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
