"""One training step of ours and of each rival: same weights, batch, loss, clipping and learning rate.

Rivals come from PyPI and are used as their manuals say, with torch's fused AdamW. All run the same forward
pass with the head at target positions only, so that what is compared is what is trained and how. None has
dropout, so that train and eval mode compute the same; all are in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from experiments.benchmarks.shapes import Shape
from nest.conversations.answers import target_logits
from nest.models.blocks import blocks_of
from nest.selection.config import UpdateForm
from nest.selection.selection import NeuronSelection
from nest.tuning.config import UpdateMode
from nest.tuning.dialogues import MicroBatch
from nest.tuning.loss import tuning_loss
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.prefix import FrozenPrefix
from nest.tuning.update import trainable

GATED = ("gate_proj", "up_proj")
MLP = (*GATED, "down_proj")
LEARNING_RATE, MAX_NORM = 1e-4, 1.0


@dataclass(frozen=True)
class Arm:
    """What is timed.

    Attributes:
        step: Forward, backward, optimizer step, gradients cleared.
        trained: How many numbers it trains.
    """

    step: Callable[[], object]
    trained: int


@contextmanager
def nest_step(
    shape: Shape,
    device: torch.device,
    *,
    first_layer: int = 0,
    form: UpdateForm = "loaded",
    mode: UpdateMode = "live",
    n_clusters: int | None = None,
) -> Iterator[Arm]:
    """Ours; the prefix is cached where the lowest tuned layer is not the first.

    The cache is filled by the first step. In a whole job each dialogue's first pass pays for that.
    """
    shape = replace(shape, n_clusters=n_clusters or shape.n_clusters)
    model, batch = shape.model(device), shape.micro_batch()
    selection = shape.selection(model, first_layer)
    with trainable(model, selection, update=form, mode=mode) as update:
        optimizer = NeuronAdamW(update, lr=LEARNING_RATE)
        blocks = blocks_of(model, [part.site for part in selection.sites])
        around: Callable[[], AbstractContextManager[None]] = nullcontext
        if blocks is not None and blocks.lowest > 0:
            around = partial(FrozenPrefix(model, blocks, device, warn=print).skipped, batch)

        def forward() -> torch.Tensor:
            with around():
                return batch_loss(model, batch, device)

        yield Arm(partial(_train, forward, optimizer), update.packed.numel())


def nest_gradient(shape: Shape, device: torch.device, *, first_layer: int, cached: bool) -> Tensor:
    """The packed gradient of one pass, from the cached prefix or through the whole model."""
    model, batch = shape.model(device), shape.micro_batch()
    selection = shape.selection(model, first_layer)
    with trainable(model, selection) as update:
        blocks = blocks_of(model, [part.site for part in selection.sites])
        assert blocks is not None
        prefix = FrozenPrefix(model, blocks, device, warn=print)
        with prefix.skipped(batch) if cached else nullcontext():
            batch_loss(model, batch, device).backward()
        assert update.packed.grad is not None
        return update.packed.grad.clone()


@contextmanager
def lora_step(
    shape: Shape, device: torch.device, *, rank: int = 16, modules: tuple[str, ...] = MLP
) -> Iterator[Arm]:
    """PEFT's LoRA with torch's fused AdamW."""
    yield _rival(adapted_by_lora(shape.model(device), rank, modules), shape, device)


def adapted_by_lora(
    model: nn.Module, rank: int = 16, modules: tuple[str, ...] = MLP, *, initialised: bool = True
) -> nn.Module:
    """A model with PEFT's LoRA in the weights' own dtype.

    By default PEFT keeps adapters of a bf16 model in fp32 and then computes them in fp32, which takes
    more time and memory; the rival is given the cheaper way.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(modules),
        init_lora_weights=initialised,
    )
    adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)
    return adapted


@contextmanager
def shira_step(shape: Shape, device: torch.device) -> Iterator[Arm]:
    """PEFT's SHiRA on the MLP, at the smallest rank: its count is r (rows + columns) a weight."""
    from peft import ShiraConfig, get_peft_model

    config = ShiraConfig(r=1, target_modules=list(MLP), random_seed=0)
    adapted = get_peft_model(shape.model(device), config, autocast_adapter_dtype=False)
    yield _rival(adapted, shape, device)


@contextmanager
def full_step(shape: Shape, device: torch.device) -> Iterator[Arm]:
    """All parameters with torch's fused AdamW."""
    yield _rival(shape.model(device), shape, device)


@contextmanager
def masked_step(shape: Shape, device: torch.device) -> Iterator[Arm]:
    """Dense gradients of gate and up, masked to the selected rows, and AdamW on the whole weights."""
    model = shape.model(device)
    selection = shape.selection(model)
    masks = masked_weights(model, selection)
    optimizer = torch.optim.AdamW(list(masks), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    batch = shape.micro_batch()

    def step() -> None:
        batch_loss(model, batch, device).backward()
        for weight, mask in masks.items():
            assert weight.grad is not None
            weight.grad *= mask
        torch.nn.utils.clip_grad_norm_(list(masks), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    yield Arm(step, selection.n_neurons * shape.d_model)


def masked_weights(model: nn.Module, selection: NeuronSelection) -> dict[nn.Parameter, Tensor]:
    """The selection's weights, trainable and everything else frozen, each with its mask (F, 1)."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    masks: dict[nn.Parameter, Tensor] = {}
    for part in selection.sites:
        weight = model.get_parameter(part.site.parameter)
        weight.requires_grad_(True)
        masks[weight] = torch.zeros_like(weight[:, :1])
        masks[weight][part.neurons.to(weight.device)] = 1
    return masks


def batch_loss(model: nn.Module, batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """Mean cross-entropy of the response tokens."""
    logits, targets, _ = target_logits(model, batch.batch, device)
    benign = torch.zeros_like(targets, dtype=torch.bool)
    total = tuning_loss(logits, targets, benign, None, benign_weight=1.0, kl_weight=0.0)
    return total / len(targets)


def _rival(model: nn.Module, shape: Shape, device: torch.device) -> Arm:
    model.eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    forward = partial(batch_loss, model, shape.micro_batch(), device)
    return Arm(partial(_train, forward, optimizer), sum(p.numel() for p in trained))


def _train(forward: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    forward().backward()
    torch.nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], MAX_NORM
    )
    optimizer.step()
    optimizer.zero_grad()


ARMS: dict[str, Callable[..., AbstractContextManager[Arm]]] = {
    "nest": nest_step,
    "lora": lora_step,
    "shira": shira_step,
    "full": full_step,
    "masked": masked_step,
}
