"""The optimizer step alone, rows written: against torch's fused AdamW in three other shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from experiments.benchmarks.arms import LEARNING_RATE, masked_weights
from experiments.benchmarks.gates import fill
from experiments.benchmarks.shapes import Shape
from nest.models.binding import bind
from nest.models.sites import read_rows
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.update import ClusterUpdate, trainable
from nest_kernels.neuron_adamw import updated_rows

Step = Callable[[], object]


@contextmanager
def optimizer_arms(shape: Shape, device: torch.device) -> Iterator[tuple[dict[str, Step], bool]]:
    """Steps by name, and whether ours left the right rows and parameters."""
    model = shape.model(device)
    selection = shape.selection(model)
    with trainable(model, selection, update="loaded") as update:
        draw = torch.Generator(device).manual_seed(0)
        update.packed.grad = torch.randn(update.packed.shape, generator=draw, device=device)
        ours = NeuronAdamW(update, lr=LEARNING_RATE)
        rows = [site.originals.clone() for site in update.rows]
        separate = _fused([_with_gradient(row) for row in rows])
        packed = _fused([_with_gradient(update.packed.detach().clone())])
        dense = _dense(masked_weights(copy.deepcopy(model), selection))
        gate = _step_is_right(model, update, ours)
        yield (
            {"nest": ours.step, "rows": separate.step, "packed": packed.step, "masked": dense},
            gate,
        )


def _step_is_right(model: nn.Module, update: ClusterUpdate, ours: NeuronAdamW) -> bool:
    """After some steps: parameters are torch's AdamW's, rows are cast(W0 + s U[c]) to the bit."""
    fill(update)
    twin = _with_gradient(update.packed.detach().clone())
    twin.grad = update.packed.grad
    theirs = torch.optim.AdamW([twin], lr=LEARNING_RATE, weight_decay=0.0)
    for _ in range(3):
        ours.step()
        theirs.step()
    same = bool(torch.allclose(twin, update.packed, rtol=1e-5, atol=1e-7))
    for site, rows in zip(update.sites, update.rows, strict=True):
        place = site.part.site
        found = read_rows(bind(model, place).weight, place, site.part.neurons)
        expected = updated_rows(rows.originals, site.vectors, rows.clusters, site.loadings)
        same &= torch.equal(found, expected)
    return same


def _dense(masks: dict[nn.Parameter, Tensor]) -> Step:
    """AdamW over whole weights with a mask on their gradients, as masked training does it."""
    for weight in masks:
        weight.grad = torch.randn_like(weight)
    optimizer = _fused(list(masks))

    def step() -> None:
        for weight, mask in masks.items():
            assert weight.grad is not None
            weight.grad *= mask
        optimizer.step()

    return step


def _with_gradient(values: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(values)
    parameter.grad = torch.randn_like(values)
    return parameter


def _fused(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
