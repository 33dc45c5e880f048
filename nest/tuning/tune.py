"""The tuning stage: supervised fine-tuning of a cluster update with everything else frozen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from nest.artifacts.unfinished import Unfinished
from nest.conversations.answers import Targets, target_logits
from nest.conversations.encoders import Encoder, rendered_hash
from nest.errors import ActivationError, NestError, NoImprovementError, TuningStoppedError
from nest.models.blocks import blocks_of, checkpointed
from nest.models.fingerprint import weights_hash
from nest.models.modes import eval_mode
from nest.patches.patch import NeuronPatch
from nest.progress import ProgressCallback
from nest.prompts.prompt_set import PromptSet
from nest.selection.selection import NeuronSelection
from nest.tuning.checkpoints import ONCE_A_MINUTE, Checkpoints, Every
from nest.tuning.config import RATE_SHARES, STEP_SHARES, TuningConfig
from nest.tuning.dialogues import (
    Example,
    MicroBatch,
    epochs_of_batches,
    prepare,
    to_micro_batches,
)
from nest.tuning.loop import StepRecord, TrainingLoop
from nest.tuning.memory import (
    MemoryEstimate,
    estimate,
    in_memory,
    is_out_of_memory,
    saved_bytes,
)
from nest.tuning.objective import Supervised
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.prefix import FrozenPrefix
from nest.tuning.rate import output_share
from nest.tuning.update import ClusterUpdate, trainable

# Prefix and model are compared on this many dialogues before anything is learned.
N_CHECKED = 4
# The automatic rate is measured on so many dialogues of the first batch, so many a forward pass.
N_ASKED, N_AT_ONCE = 16, 4


@dataclass(frozen=True)
class Training:
    """What was done to come to a patch, whether or not there is one.

    Attributes:
        selection: The neurons.
        trainable_parameters: Numbers that were trained.
        history: The loss curve.
        steps: Optimizer steps done.
        seconds: Wall time of the training loop.
    """

    selection: NeuronSelection
    trainable_parameters: int
    history: tuple[StepRecord, ...]
    steps: int
    seconds: float


@dataclass(frozen=True)
class TuningResult(Training):
    """What tuning gives.

    Attributes:
        patch: The update of the best step.
        best_step: Step with the lowest validation loss; at least 1.
        tokens_per_second: Tokens, padding left out, through training per second.
        memory: What it was expected to hold.
    """

    patch: NeuronPatch
    best_step: int
    tokens_per_second: float
    memory: MemoryEstimate


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
    notice: Callable[[str], None] | None = None,
    warn: Callable[[str], None] = warnings.warn,
    work: Unfinished | None = None,
    checkpoint_every: Every = ONCE_A_MINUTE,
    rate_factor: float = 1.0,
    after_step: Callable[[], float] | None = None,
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
        notice: Told the memory that will be needed, before the first step.
        warn: Told what deserves attention; by default a Python warning.
        work: Keeps a checkpoint, from which the same call goes on; it ends with the same bytes as an
            undisturbed run (on the CPU; a GPU's sums may differ in their last bits).
        checkpoint_every: How often it is written.
        rate_factor: What the automatic learning rate is multiplied with.
        after_step: See `TrainingLoop`.

    Raises:
        InputError: dialogues that cannot be trained on, or no memory for a single one.
        NoImprovementError: no step lowered the validation loss.
        SelectionError: the selection is of another model, or its weights cannot be written.
        ActivationError: the loss or the gradient is not a finite number; a `TuningStoppedError`, which
            carries the result so far, if some step was good before.

    Source: arXiv 2602.16835, section 3.5; the KL term after arXiv 2601.23143.
    """
    if config.layers is not None:
        selection = selection.in_layers(*config.layers)
    train, validation, n_steps = prepare(encoder, harmful, benign, config)
    rendered = rendered_hash(example.ids for example in (*train, *validation))
    if work is not None:
        work.begin(
            "patch",
            {
                "config": asdict(config),
                "prompts": {"harmful": harmful.sha256, "benign": benign.sha256},
                "rendered dialogues": rendered,
                "selection": selection.sha256(),
                "model": weights_hash(model),
            },
        )
        if notice is not None and work.goes_on:
            notice(f"going on with what is kept in {work.folder}")
    with (
        eval_mode(model),  # dropout would be noise on top of a frozen model
        trainable(
            model,
            selection,
            update=config.update,
            mode=config.mode,
            seed=config.seed,
            start=config.resolved_start,
        ) as update,
    ):
        update.check_patchable()
        ask = _Forward(model, update, config, warn)
        ask.check([*train[:N_CHECKED]], encoder.pad_id)
        memory = _memory(model, update, ask, [*train, *validation], encoder.pad_id, config)
        if notice is not None:
            notice(memory.sentence())
        objective = Supervised(
            ask, update, benign_weight=config.benign_weight, kl_weight=config.kl_weight
        )
        rates = _rates(update, ask, train, encoder.pad_id, memory, config, rate_factor)
        checkpoints = None if work is None else Checkpoints(work, checkpoint_every)
        attempt = 0 if checkpoints is None else checkpoints.attempt
        while True:
            rate, is_last = rates[attempt], attempt + 1 == len(rates)
            loop = TrainingLoop(
                encoder,
                update,
                NeuronAdamW(update, lr=rate, weight_decay=config.weight_decay),
                objective,
                config,
                n_steps,
                micro_batch_size=memory.micro_batch_size,
                progress=progress,
                warn=warn,
                checkpoints=checkpoints,
                met=ask.met,
                gives_up=not is_last,
                backs_off=config.learning_rate is None,
                after_step=after_step,
            )
            stopped: ActivationError | None = None
            try:
                loop.run(train, validation)
            except ActivationError as fault:
                stopped = fault
            if loop.best_step > 0 or is_last:
                break
            attempt += 1
            if checkpoints is not None:
                checkpoints.attempt = attempt
            warn(
                f"the automatic learning rate {rate:.3g} is too high for this model and selection "
                f"(validation loss {loop.best_loss:.4g} at the start, "
                f"{loop.history[-1].validation_loss:.4g} later); beginning anew with {rates[attempt]:.3g}"
            )
        if work is not None and (stopped is not None or loop.best_step == 0):
            work.forget()
        done = Training(
            selection=selection,
            trainable_parameters=selection.trainable_parameters(config.update),
            history=tuple(loop.history),
            steps=n_steps,
            seconds=loop.seconds,
        )
        if loop.best_step == 0:
            raise _without_effect(loop, rate, stopped, done)
        record = {
            "config": {**asdict(config), "learning_rate": loop.peak_rate},
            "micro_batch_size": loop.micro_batch_size,
            "prefix_cached": ask.prefix is not None,
            "prompts": {"harmful": harmful.to_manifest(), "benign": benign.to_manifest()},
            "rendered_sha256": rendered,
            "rates_too_high": list(rates[:attempt]),
            "backed_off": loop.backed_off,
            "steps": n_steps,
            "best_step": loop.best_step,
            "best_validation_loss": loop.best_loss,
            "history": [asdict(entry) for entry in loop.history],
        }
        own = {"tuning": record, "selection": dict(selection.provenance)}
        result = TuningResult(
            **vars(done),
            patch=update.patch({**(provenance or {}), **own}),
            best_step=loop.best_step,
            tokens_per_second=loop.n_tokens / max(loop.seconds, 1e-9),
            memory=memory,
        )
        if stopped is not None:
            raise TuningStoppedError(
                f"{stopped}; step {loop.best_step} was good", result
            ) from stopped
        return result


def _rates(
    update: ClusterUpdate,
    ask: Callable[[MicroBatch], Targets],
    train: Sequence[Example],
    pad_id: int,
    memory: MemoryEstimate,
    config: TuningConfig,
    factor: float,
) -> tuple[float, ...]:
    """The learning rates to try, one after the other; the user's own is the only one.

    Raises:
        ActivationError: the gradient is not finite before the first step.
    """
    if config.learning_rate is not None:
        return (config.learning_rate,)
    batch = next(epochs_of_batches(train, config.batch_size, seed=config.seed))
    examples = dict.fromkeys(batch[index * len(batch) // N_ASKED] for index in range(N_ASKED))
    # the KL of an update that changes nothing yet has no gradient
    objective = Supervised(ask, update, benign_weight=config.benign_weight, kl_weight=0.0)
    share = in_memory(
        lambda size: output_share(update, objective, to_micro_batches([*examples], size, pad_id)),
        min(N_AT_ONCE, memory.micro_batch_size),
        "tune with --checkpointing, on fewer --layers, or leave out the longest dialogues",
    )
    if not 0 < share < math.inf:
        raise ActivationError(
            f"a step of rate 1 would move the sites' outputs by {share} times themselves, so that no "
            "learning rate can be derived; give one (--learning-rate), or tune in --dtype float32"
        )
    # Of a few digits, so that it does not hang on how much memory was free.
    rate = float(f"{factor * STEP_SHARES[config.resolved_start] / share:.3g}")
    return tuple(rate * part for part in RATE_SHARES)


def _without_effect(
    loop: TrainingLoop, rate: float, stopped: ActivationError | None, done: Training
) -> NestError:
    """Why there is no patch."""
    if stopped is not None:
        return ActivationError(f"{stopped}; no step was good, nothing was written")
    return NoImprovementError(
        f"no step lowered the validation loss ({loop.best_loss:.4g} at the start, "
        f"{loop.history[-1].validation_loss:.4g} at the end), so that a patch would change nothing, and "
        f"none is made; try a learning rate of {rate / 4:.2g} or less (--learning-rate), or more dialogues",
        done,
    )


class _Forward:
    """The forward pass on a micro-batch: from the lowest tuned block on, if the rest is cached."""

    def __init__(
        self,
        model: nn.Module,
        update: ClusterUpdate,
        config: TuningConfig,
        warn: Callable[[str], None],
    ) -> None:
        self.model, self.device, self._warn = model, update.packed.device, warn
        self.prefix: FrozenPrefix | None = None
        blocks = blocks_of(model, [part.site for part in update.selection.sites])
        self._checkpointed: Sequence[nn.Module] = ()
        if config.checkpointing:
            if blocks is None:
                warn("checkpointing has no effect: the tuned sites are not in one list of blocks")
            else:
                self._checkpointed = blocks.modules[blocks.lowest :]
        if config.cache_prefix and blocks is not None and blocks.lowest > 0:
            self.prefix = FrozenPrefix(model, blocks, self.device, warn=warn)

    def __call__(self, micro_batch: MicroBatch) -> Targets:
        with checkpointed(self._checkpointed):
            return self.whole(micro_batch)

    def whole(self, micro_batch: MicroBatch) -> Targets:
        """The same without checkpointing."""
        with nullcontext() if self.prefix is None else self.prefix.skipped(micro_batch):
            return target_logits(self.model, micro_batch.batch, self.device)

    def met(self, examples: Sequence[Example]) -> None:
        """Take note of dialogues that an earlier run has put through the model together."""
        if self.prefix is not None:
            self.prefix.met(examples)

    @property
    def n_blocks(self) -> int:
        """How many blocks are checkpointed, at least one."""
        return max(1, len(self._checkpointed))

    def check(self, examples: Sequence[Example], pad_id: int) -> None:
        """Leave the prefix out where the model does not compute the same from it."""
        if self.prefix is None:
            return
        micro_batch = MicroBatch.of(examples, pad_id)

        def logits(asked: MicroBatch) -> torch.Tensor:
            return target_logits(self.model, asked.batch, self.device).logits

        if not self.prefix.agrees(micro_batch, logits):
            self.prefix = None
            self._warn(
                "this model's blocks look back past the one below them: the frozen blocks are run in "
                "every step"
            )


def _memory(
    model: nn.Module,
    update: ClusterUpdate,
    ask: _Forward,
    examples: Sequence[Example],
    pad_id: int,
    config: TuningConfig,
) -> MemoryEstimate:
    """Measured on the longest dialogue; where even that does not fit, the loop will say so."""
    longest = max(examples, key=lambda example: len(example.ids))
    micro_batch = MicroBatch.of([longest], pad_id)
    sizes: list[int] = []

    def run() -> Targets:
        found = ask(micro_batch)
        sizes.append(4 * found.logits.numel())
        return found

    activations = 0
    try:
        activations = saved_bytes(model, run)
        if config.checkpointing:  # and one block whole, while it is run again
            activations += saved_bytes(model, lambda: ask.whole(micro_batch)) // ask.n_blocks
    except (RuntimeError, MemoryError) as fault:
        if not is_out_of_memory(fault):
            raise
    packed = update.packed
    rows = sum(site.originals.numel() * site.originals.element_size() for site in update.rows)
    return estimate(
        model=model,
        # parameters, gradient and two moments
        update_bytes=4 * packed.numel() * packed.element_size() + rows,
        activation_bytes=activations,
        logit_bytes=sum(sizes),
        batch_size=config.batch_size,
        device=ask.device,
        micro_batch_size=config.micro_batch_size,
    )
