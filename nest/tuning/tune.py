"""The tuning stage: supervised fine-tuning of a cluster update with everything else frozen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from nest.models.chat import Encoder
from nest.patches.patch import NeuronPatch
from nest.prompts.prompt_set import PromptSet
from nest.selection.selection import NeuronSelection
from nest.tuning.config import RELATIVE_RATE, TuningConfig
from nest.tuning.dialogues import prepare
from nest.tuning.loop import ProgressCallback, StepRecord, TrainingLoop
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.update import trainable


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
    train, validation, n_steps = prepare(encoder, harmful, benign, config)
    training = [module for module in model.modules() if module.training]
    with trainable(model, selection, update=config.update, seed=config.seed) as update:
        try:
            model.eval()  # dropout would be noise on top of a frozen model
            device = update.sites[0].weight.device
            rate = config.learning_rate or RELATIVE_RATE * update.row_scale()
            optimizer = NeuronAdamW(update, lr=rate, weight_decay=config.weight_decay)
            loop = TrainingLoop(
                model, encoder, update, optimizer, device, config, n_steps, progress
            )
            loop.run(train, validation)
        finally:
            for module in training:
                module.training = True
        patch = update.patch(
            {
                **(provenance or {}),
                "tuning": {
                    "config": {**asdict(config), "learning_rate": rate},
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
