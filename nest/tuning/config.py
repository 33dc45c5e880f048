"""Settings of the tuning stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from nest.selection.config import UpdateForm
from nest.settings import AtLeastOne, Auto, Layers, NotNegative, Positive, Share, settings

UpdateMode = Literal["live", "branch"]
UpdateStart = Literal["zero_vectors", "zero_loadings"]
TrainOn = Literal["last", "all"]

START_OF: Mapping[UpdateForm, UpdateStart] = {"shared": "zero_vectors", "loaded": "zero_loadings"}
# How far the automatic rate's first step would move the sites' outputs (`output_share`).
STEP_SHARES: Mapping[UpdateStart, float] = {"zero_vectors": 0.5, "zero_loadings": 0.02}
PAPER: Mapping[str, Any] = {"update": "shared", "epochs": 5.0, "kl_weight": 0.0}
"""What the paper's tuning has that ours does not begin with (arXiv 2602.16835, section 3.5)."""
# What of the automatic rate is tried, one after the other, until one lowers the validation loss.
RATE_SHARES = (1.0, 0.25, 0.0625)
# Weights are of the order of 1; anything beyond this is a slip of the pen.
MAX_LEARNING_RATE = 1e6
# Dialogues an optimizer step.
BATCH_SIZE = 32


def _dialogues(value: Any) -> Any:
    return BATCH_SIZE if value == "auto" else value


@settings("tuning settings")
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
        start: `zero_vectors`: vectors of 0, and loadings of 1 and a little noise; `zero_loadings`:
            loadings of 0 and random vectors, as a LoRA begins. None takes the form's own: zero_loadings
            for loaded, and for shared the only one it has.
        layers: First layer to tune and the layer after the last one (None: to the end); None for all
            that the selection has. Nothing is run backward below the lowest.
        checkpointing: Keep the inputs of blocks only and run them again in the backward pass: about
            a third more time, and a fraction of the activations' memory.
        cache_prefix: Keep the hidden states that enter the lowest tuned block, where it is not the
            first, and begin every later pass there.
        train_on: `last`: a dialogue's last answer is learned; `all`: every turn of the assistant's.
        learning_rate: Peak of the schedule; None takes the one with which a first step would move the
            sites' outputs by 2 % of themselves (from zero vectors: by half), whatever the number of
            neurons, the width and the scale of the weights. It begins anew with a quarter where that does
            not lower the validation loss, and goes back and on with a quarter where a later step breaks it.
        warmup: Share of the steps in which the rate climbs linearly, in [0, 1).
        weight_decay: Decoupled decay of the vectors.
        clip: Largest norm of the gradient; 0 never clips.
        benign_weight: Weight of the cross-entropy on benign answers, against 1 on refusals.
        kl_weight: Weight of KL(base || tuned) on benign answers; 0 leaves it out, and with it one
            forward pass of the base a step.
        validation: Share of the dialogues held back, in (0, 1).
        validate_every: Optimizer steps between validations; the best step is kept.
        seed: Of split, order, vectors and loadings.
    """

    update: UpdateForm = "loaded"
    epochs: Annotated[float, Positive] = 2.0
    max_steps: Annotated[int, AtLeastOne] | None = None
    batch_size: Annotated[int, AtLeastOne, BeforeValidator(_dialogues)] = BATCH_SIZE
    micro_batch_size: Annotated[Annotated[int, AtLeastOne] | None, Auto] = None
    mode: UpdateMode = "live"
    start: Annotated[UpdateStart | None, Auto] = None
    layers: Layers = None
    checkpointing: bool = False
    cache_prefix: bool = True
    train_on: TrainOn = "last"
    learning_rate: Annotated[Annotated[float, Field(gt=0, le=MAX_LEARNING_RATE)] | None, Auto] = (
        None
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    weight_decay: Annotated[float, NotNegative] = 0.0
    clip: Annotated[float, NotNegative] = 1.0
    benign_weight: Annotated[float, NotNegative] = 1.0
    kl_weight: Annotated[float, NotNegative] = 1.0
    validation: Annotated[float, Share] = 0.05
    validate_every: Annotated[int, AtLeastOne] = 25
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @property
    def resolved_start(self) -> UpdateStart:
        """Where the update begins."""
        return self.start or START_OF[self.update]

    @model_validator(mode="after")
    def _start_fits(self) -> TuningConfig:
        if self.update == "shared" and self.start == "zero_loadings":
            raise ValueError(
                "start is zero_loadings, and the shared form has no loadings; leave start out, or choose "
                "update = loaded"
            )
        return self
