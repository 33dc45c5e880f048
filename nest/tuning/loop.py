"""The training loop: steps, validation and the best step, for anything small on a frozen model."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from nest.conversations.encoders import Encoder
from nest.errors import ActivationError, NoMemoryError
from nest.progress import ProgressCallback
from nest.tuning.checkpoints import (
    Checkpoints,
    TuningState,
    load_optimizer,
    optimizer_tensors,
)
from nest.tuning.config import TuningConfig
from nest.tuning.dialogues import Example, epochs_of_batches, to_micro_batches
from nest.tuning.memory import is_out_of_memory
from nest.tuning.objective import Objective
from nest.tuning.trainable import Trainable

# A validation loss of so many times the base's does not come down again.
DIVERGED = 1.5
# A training loss of so many times the base's validation loss is looked at at once.
SPIKE = 3.0
# What the rate is multiplied with where a step broke the loss, and how often.
BACK_OFF, MOST_BACK_OFFS = 0.25, 3
MEND = "Lower the learning rate (--learning-rate) or tune in --dtype float32"


@dataclass(frozen=True)
class StepRecord:
    """One point of the loss curve.

    Attributes:
        step: Optimizer steps done.
        train_loss: Mean since the last record; None before the first step.
        validation_loss: On the held-back dialogues.
        learning_rate: Of the next step.
    """

    step: int
    train_loss: float | None
    validation_loss: float
    learning_rate: float


class TrainingLoop:
    """Steps, validation and the best step; the update is left at the step that its objective keeps.

    A step that runs out of memory is taken again in forward passes of half as many dialogues.

    Args:
        encoder: For its padding.
        update: What is trained.
        optimizer: Steps it.
        objective: What is minimised.
        config: How.
        n_steps: Optimizer steps.
        micro_batch_size: Dialogues a forward pass.
        progress: Called with stage, steps done, steps in all.
        warn: Told what deserves attention.
        checkpoints: Where the state is kept now and then, and gone on from.
        met: Told of dialogues that an earlier run has put through the model together.
        gives_up: End where the validation loss rises far above the base's before it was ever below.
        backs_off: Where the loss breaks after good steps, go back to the best of them and on with a
            quarter of the rate.
        after_step: Called after each step, with the update in effect; gives the seconds it took, which
            are none of the loop's.

    Attributes:
        history: The loss curve.
        best_step: The step that was kept: that with the lowest validation loss, 0 if no step beat the
            base, or the last where the objective keeps that.
        best_loss: Its validation loss.
        peak_rate: Of the schedule before anything was gone back from; a resumed run's is the earlier one's.
        backed_off: Steps after which the rate became a quarter of what it was.
        micro_batch_size: As it is now.
        n_tokens: Tokens that went through training steps, padding left out.
        seconds: Wall time of `run`.
    """

    def __init__(
        self,
        encoder: Encoder,
        update: Trainable,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        config: TuningConfig,
        n_steps: int,
        *,
        micro_batch_size: int,
        progress: ProgressCallback | None = None,
        warn: Callable[[str], None] = warnings.warn,
        checkpoints: Checkpoints | None = None,
        met: Callable[[Sequence[Example]], None] | None = None,
        gives_up: bool = False,
        backs_off: bool = False,
        after_step: Callable[[], float] | None = None,
    ) -> None:
        self.encoder, self.update, self.config, self.objective = encoder, update, config, objective
        self.n_steps, self.progress, self.warn = n_steps, progress, warn
        self._checkpoints, self._met, self._gives_up = checkpoints, met, gives_up
        self._backs_off, self._after_step = backs_off, after_step
        # (first step, dialogues a forward pass): it shrinks when memory runs out
        self._sizes = [(0, micro_batch_size)]
        self.micro_batch_size = micro_batch_size
        self.optimizer = optimizer
        self.backed_off: list[int] = []
        self.peak_rate = float(optimizer.defaults["lr"])
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._factor)
        self.history: list[StepRecord] = []
        self.best_step, self.best_loss = 0, math.inf
        self.n_tokens, self.seconds, self._started = 0, 0.0, 0.0
        self._best: list[Tensor] = []

    def run(self, train: Sequence[Example], validation: Sequence[Example]) -> None:
        """All steps, from the base model or from a checkpoint on.

        Raises:
            ActivationError: the loss or a gradient is not finite, or the loss has diverged and the loop
                gives up. The update is then at the best step before that.
            InputError: a checkpoint that cannot be read.
        """
        state = None if self._checkpoints is None else self._checkpoints.read()
        self._started = time.monotonic()
        self._best = self.update.snapshot() if state is None else state.best
        try:
            batches = epochs_of_batches(train, self.config.batch_size, seed=self.config.seed)
            losses: list[float] = []
            if state is None:
                self._record(0, None, validation)
            else:
                losses = self._resume(state)
                self._meet(0, validation)
                for step in range(1, state.step + 1):
                    self._meet(step, next(batches))
                self._started -= self.seconds
            for step in range(1 if state is None else state.step + 1, self.n_steps + 1):
                losses = self._advance(next(batches), step, losses, validation)
                if self._checkpoints is not None and self._checkpoints.due(step):
                    self.seconds = time.monotonic() - self._started
                    self._checkpoints.write(self._state(step, self._best, losses))
                if self.progress:
                    self.progress("tune", step, self.n_steps)
        finally:
            self.update.load_snapshot(self._best)
            self.seconds = time.monotonic() - self._started

    def _advance(
        self,
        examples: Sequence[Example],
        step: int,
        losses: list[float],
        validation: Sequence[Example],
    ) -> list[float]:
        """One step and what is due after it; the losses since the last record."""
        try:
            losses = [*losses, self._step(examples, step)]
        except ActivationError:
            # The steps since the last validation were good: see whether they are the best.
            with suppress(ActivationError):
                if losses:
                    self._record(step - 1, fmean(losses), validation)
            if not self._can_back_off or step == self.n_steps:
                raise
            self.schedule.step()  # which the step did not come to
            self._back_off(step)
            return []
        if self._after_step is not None:
            self._started += self._after_step()
        is_due = step % self.config.validate_every == 0 or step == self.n_steps
        if not is_due and not self._looks_broken(losses[-1]):
            return losses
        try:
            self._record(step, fmean(losses), validation)
        except ActivationError:
            if not self._can_back_off or step == self.n_steps:
                raise
            self._back_off(step)
            return []
        first, last = self.history[0].validation_loss, self.history[-1].validation_loss
        if (
            self._can_back_off and last > first and step < self.n_steps
        ):  # worse than before anything was learned
            self._back_off(step)
        return []

    def _factor(self, step: int) -> float:
        """Of the peak learning rate."""
        backed_off: float = BACK_OFF ** len(self.backed_off)
        return backed_off * learning_rate_factor(step, self.n_steps, self.config.warmup)

    @property
    def _can_back_off(self) -> bool:
        return self._backs_off and self.best_step > 0 and len(self.backed_off) < MOST_BACK_OFFS

    def _looks_broken(self, train_loss: float) -> bool:
        """Whether a step's loss cannot wait for the next validation."""
        asked = self._gives_up or self._can_back_off
        return asked and train_loss > SPIKE * self.history[0].validation_loss

    def _back_off(self, step: int) -> None:
        """Stand at the best step again, without momentum and with a quarter of the rate."""
        self.backed_off.append(step)
        self.update.load_snapshot(self._best)
        self.optimizer.state.clear()
        for group, peak in zip(self.optimizer.param_groups, self.schedule.base_lrs, strict=True):
            rate = peak * self._factor(self.schedule.last_epoch)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.warn(
            f"the loss broke at step {step}: going on from step {self.best_step} with a quarter of the "
            "learning rate"
        )

    def _state(self, step: int, best: list[Tensor], losses: Sequence[float]) -> TuningState:
        numbers = {
            "losses": list(losses),
            "history": [asdict(record) for record in self.history],
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "n_tokens": self.n_tokens,
            "seconds": self.seconds,
            "sizes": self._sizes,
            "backed_off": self.backed_off,
            "peak_rate": self.peak_rate,
            **self.objective.numbers(),
        }
        optimizer = optimizer_tensors(self.optimizer)
        return TuningState(step, self.update.snapshot(), best, optimizer, numbers)

    def _resume(self, state: TuningState) -> list[float]:
        """Stand where a checkpoint was written; the losses since the last record come back."""
        numbers = state.numbers
        self.update.load_snapshot(state.parameters)
        load_optimizer(self.optimizer, state.optimizer)
        self.schedule.last_epoch = state.step
        self.history = [StepRecord(**record) for record in numbers["history"]]
        self.best_step, self.best_loss = numbers["best_step"], numbers["best_loss"]
        self.n_tokens, self.seconds = numbers["n_tokens"], numbers["seconds"]
        self._sizes = [(first, size) for first, size in numbers["sizes"]]
        self.backed_off = list(numbers["backed_off"])
        self.peak_rate = numbers["peak_rate"]
        self.schedule.base_lrs = [
            rate.new_tensor(self.peak_rate) if isinstance(rate, Tensor) else self.peak_rate
            for rate in self.schedule.base_lrs
        ]
        self.micro_batch_size = self._sizes[-1][1]
        self.objective.resume(numbers)
        losses: list[float] = numbers["losses"]
        return losses

    def _meet(self, step: int, examples: Sequence[Example]) -> None:
        """Take note of a step that an earlier run has done, in the order in which it was done."""
        size = next(size for first, size in reversed(self._sizes) if first <= step)
        micro_batches = to_micro_batches(examples, size, self.encoder.pad_id)
        for micro_batch in micro_batches:
            group = self.objective.met(micro_batch)
            if self._met is not None and group:
                self._met(group)
        for micro_batch in micro_batches if self._met is not None else ():
            assert self._met is not None
            self._met(micro_batch.examples)

    def _record(self, step: int, train_loss: float | None, validation: Sequence[Example]) -> None:
        """Note a validation loss, and the parameters where it is the lowest so far or the last is kept."""
        loss = self._loss_in_memory(validation, step, backward=False)
        # Before the first step the step itself will tell, and name the site.
        if step > 0 and not math.isfinite(loss):
            raise ActivationError(
                f"after step {step} the validation loss is {loss}, not a finite number. {MEND}"
            )
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.history.append(StepRecord(step, train_loss, loss, rate))
        hopeless = step > 0 and self.best_step == 0 and loss > DIVERGED * self.best_loss
        if hopeless and self._gives_up:
            raise ActivationError(
                f"after step {step} the validation loss is {loss:.4g}, up from {self.best_loss:.4g}. {MEND}"
            )
        if loss < self.best_loss or self.objective.keeps == "last":
            self.best_loss, self.best_step = loss, step
            self._best = self.update.snapshot()

    def _step(self, examples: Sequence[Example], step: int) -> float:
        """One optimizer step over its micro-batches; the loss before it."""
        loss = self._loss_in_memory(examples, step - 1, backward=True)
        self._check_finite(loss, step)
        if self.config.clip > 0:
            nn.utils.clip_grad_norm_(self.update.parameters(), self.config.clip)
        self.optimizer.step()
        self.schedule.step()
        self.n_tokens += sum(len(example.ids) for example in examples)
        return loss

    def _loss_in_memory(self, examples: Sequence[Example], step: int, *, backward: bool) -> float:
        """`_total_loss` in passes that there is memory for."""
        while True:
            self.optimizer.zero_grad()
            try:
                return self._total_loss(examples, step, backward=backward)
            except (RuntimeError, MemoryError) as fault:
                if not is_out_of_memory(fault):
                    raise
                if self.micro_batch_size == 1:
                    raise NoMemoryError(
                        "there is no memory for a single dialogue; tune with --checkpointing, on fewer "
                        "--layers, or leave out the longest dialogues"
                    ) from fault
            # Out of the except clause, so that the failed pass and its tensors are gone.
            self.micro_batch_size = -(-self.micro_batch_size // 2)
            self._sizes.append((self.schedule.last_epoch + 1, self.micro_batch_size))
            self.warn(
                f"out of memory: going on with {self.micro_batch_size} dialogues a forward pass "
                f"(--micro-batch-size {self.micro_batch_size} begins there)"
            )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _total_loss(self, examples: Sequence[Example], step: int, *, backward: bool) -> float:
        """The objective's loss; with `backward` its gradient is gathered, too."""
        micro_batches = to_micro_batches(examples, self.micro_batch_size, self.encoder.pad_id)
        total = 0.0
        with torch.set_grad_enabled(backward):
            for loss in self.objective.losses(micro_batches, step):
                if backward:
                    loss.backward()
                total += float(loss.detach())
        return total

    def _check_finite(self, loss: float, step: int) -> None:
        bad = [name for name, g in self.update.gradients().items() if not bool(g.isfinite().all())]
        # The loadings' gradients have no name of their own.
        finite = all(
            bool(p.grad.isfinite().all()) for p in self.update.parameters() if p.grad is not None
        )
        if bad or not finite or not math.isfinite(loss):
            where = f" and the gradient at {', '.join(bad)}" if bad else ""
            raise ActivationError(
                f"at step {step} the loss is {loss}{where}: not finite numbers. {MEND}"
            )


def learning_rate_factor(step: int, n_steps: int, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then a cosine to zero."""
    n_warmup = round(warmup * n_steps)
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    done = (step - n_warmup) / max(1, n_steps - n_warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
