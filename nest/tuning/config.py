"""Settings of the tuning stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nest.errors import InputError
from nest.selection.config import UpdateForm, layer_faults

UpdateMode = Literal["live", "branch"]
TrainOn = Literal["last", "all"]

# Peak learning rate in units of the selected rows' root mean square. Swept on the bazaar (loaded, 200
# steps, four clusters a site): at a tenth of it 69 % of wrapped requests still got through, at a third
# 14 %, at this 5 %.
RELATIVE_RATE = 1.7
# What of it is tried, one after the other, until one lowers the validation loss. On SmolLM2-135M with the
# default selection it went from 2.9 to 12 with the whole rate (0.35), and to 0.76 with 0.1.
RATE_SHARES = (1.0, 0.25, 0.0625)
# Weights are of the order of 1; anything beyond this is a slip of the pen.
MAX_LEARNING_RATE = 1e6


@dataclass(frozen=True)
class TuningConfig:
    """How a cluster update is trained.

    Attributes:
        update: `shared`: every neuron of a cluster gets the same vector (the paper's form);
            `loaded`: the vector times a learned scalar of its own.
        epochs: Passes over the dialogues (the paper takes 5).
        max_steps: Stop after this many optimizer steps; None leaves it to the epochs.
        batch_size: Dialogues an optimizer step, harmful and benign in the data's proportion.
        micro_batch_size: Dialogues a forward pass; gradients of a step's passes are summed. None takes
            as many as there is memory for.
        mode: `live`: the model's rows carry the update; `branch`: it is added to the projections'
            outputs, and no weight is written.
        layers: First layer to tune and the layer after the last one (None: to the end); None for all
            that the selection has. Nothing is run backward below the lowest.
        checkpointing: Keep the inputs of blocks only and run them again in the backward pass: about
            a third more time, and a fraction of the activations' memory.
        cache_prefix: Keep the hidden states that enter the lowest tuned block, where it is not the
            first, and begin every later pass there.
        train_on: `last`: a dialogue's last answer is learned; `all`: every turn of the assistant's.
        learning_rate: Peak of the schedule; None takes `RELATIVE_RATE` times the root mean square of
            the selected rows, so that it fits models of any weight scale, and begins anew with a quarter
            where that does not lower the validation loss.
        warmup: Share of the steps in which the rate climbs linearly, in [0, 1).
        weight_decay: Decoupled decay of the vectors.
        clip: Largest norm of the gradient; 0 never clips.
        benign_weight: Weight of the cross-entropy on benign answers, against 1 on refusals.
        kl_weight: Weight of KL(base || tuned) on benign answers; 0 leaves it out, and with it one
            forward pass of the base a step.
        validation: Share of the dialogues held back, in (0, 1).
        validate_every: Optimizer steps between validations; the best step is kept.
        seed: Of split, order and loadings.
    """

    update: UpdateForm = "loaded"
    epochs: float = 2.0
    max_steps: int | None = None
    batch_size: int = 32
    micro_batch_size: int | None = None
    mode: UpdateMode = "live"
    layers: tuple[int, int | None] | None = None
    checkpointing: bool = False
    cache_prefix: bool = True
    train_on: TrainOn = "last"
    learning_rate: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    benign_weight: float = 1.0
    kl_weight: float = 1.0
    validation: float = 0.05
    validate_every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)}; it must be a finite number"
            for name in (
                "epochs",
                "learning_rate",
                "warmup",
                "weight_decay",
                "clip",
                "benign_weight",
                "kl_weight",
            )
            if getattr(self, name) is not None and not math.isfinite(getattr(self, name))
        ]
        if not 0 <= self.seed < 2**32:
            faults.append(f"seed is {self.seed}; it must lie in 0 to {2**32 - 1}")
        if self.learning_rate is not None and self.learning_rate > MAX_LEARNING_RATE:
            faults.append(
                f"learning_rate is {self.learning_rate:g}; it must be at most {MAX_LEARNING_RATE:g}"
            )
        if self.update not in ("shared", "loaded"):
            faults.append(f"update is {self.update!r}; choose shared or loaded")
        if self.mode not in ("live", "branch"):
            faults.append(f"mode is {self.mode!r}; choose live or branch")
        if self.train_on not in ("last", "all"):
            faults.append(f"train_on is {self.train_on!r}; choose last or all")
        faults += layer_faults(self.layers)
        for name in ("batch_size", "micro_batch_size", "validate_every", "max_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                faults.append(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                faults.append(f"{name} is {value}; it must be positive")
        for name in ("weight_decay", "clip", "benign_weight", "kl_weight"):
            if not getattr(self, name) >= 0:
                faults.append(f"{name} is {getattr(self, name)}; it cannot be negative")
        if not 0.0 <= self.warmup < 1.0:
            faults.append(f"warmup is {self.warmup}; it must lie in [0, 1)")
        if not 0.0 < self.validation < 1.0:
            faults.append(f"validation is {self.validation}; it must lie between 0 and 1")
        if faults:
            raise InputError("tuning settings: " + "; ".join(faults))
