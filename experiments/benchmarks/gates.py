"""What must hold in the same run for a ratio to count."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from experiments.benchmarks.arms import adapted_by_lora, batch_loss, masked_weights
from experiments.benchmarks.shapes import TINY, Shape
from nest.errors import ActivationError
from nest.tuning.config import UpdateMode
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.update import ClusterUpdate, trainable

RELATIVE = 1e-9
# The run's own dtype against fp64. On a GPU this is where the kernels are gated: fp64 runs without them.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.05}
N_STEPS = 50


@cache
def step_gate(device_name: str, dtype: torch.dtype) -> bool:
    """All gates of a tuning step, on this device; the last in this dtype."""
    device = torch.device(device_name)
    try:
        exact = [
            gradient_error(TINY, device),
            gradient_error(TINY, device, mode="branch"),
            loaded_error(TINY, device),
            curve_error(TINY, device),
        ]
    except ActivationError:  # the optimizer itself saw a gradient that is not finite
        return False
    rounded = rounding_error(replace(TINY, dtype=dtype), device)
    return all(error <= RELATIVE for error in exact) and rounded <= ROUNDING[dtype]


def gradient_error(shape: Shape, device: torch.device, mode: UpdateMode = "live") -> float:
    """Largest relative difference between dU and the gradient of a PEFT LoRA's A.

    The LoRA's B is frozen to the membership matrix; everything is fp64.
    """
    model = shape.model(device)
    selection = shape.selection(model)
    twin = copy.deepcopy(model)
    modules = tuple(part.site.module for part in selection.sites)
    # alpha is twice the rank: half of the membership matrix is the whole
    lora = adapted_by_lora(twin, shape.n_clusters, modules).double()
    batch = shape.micro_batch()
    with trainable(model, selection, update="shared", mode=mode, dtype=torch.float64) as update:
        fill(update)
        layers = {s.part.site.name: twin.get_submodule(s.part.site.module) for s in update.sites}
        for site in update.sites:
            layer = layers[site.part.site.name]
            rows, columns = site.part.neurons.to(device), site.part.clusters.to(device)
            with torch.no_grad():
                layer.lora_A["default"].weight.copy_(site.vectors)
                layer.lora_B["default"].weight.zero_()
                layer.lora_B["default"].weight[rows, columns] = 0.5
            layer.lora_B["default"].weight.requires_grad_(False)
        batch_loss(model, batch, device).backward()
        batch_loss(lora, batch, device).backward()
        return worst(
            relative(found, layers[name].lora_A["default"].weight.grad)
            for name, found in update.gradients().items()
        )


def loaded_error(shape: Shape, device: torch.device) -> float:
    """Largest relative difference of dU and ds from what a dense weight gradient G says, fp64.

    dU[c] is the sum of s_i G_i over the cluster's rows, ds_i the product of G_i and U[c(i)].
    """
    model = shape.model(device)
    selection, twin, batch = shape.selection(model), copy.deepcopy(model), shape.micro_batch()
    errors = []
    with trainable(model, selection, dtype=torch.float64) as update:
        fill(update)
        weights = [twin.get_parameter(part.site.parameter) for part in selection.sites]
        for part, weight in zip(selection.sites, weights, strict=True):
            weight.data.copy_(model.get_parameter(part.site.parameter))
        batch_loss(model, batch, device).backward()
        batch_loss(twin, batch, device).backward()
        vectors, loadings = update.gradients(), update.loading_gradients()
        for site, weight in zip(update.sites, weights, strict=True):
            place, clusters = site.part.site, site.part.clusters.to(device)
            assert weight.grad is not None and site.loadings is not None
            dense = weight.grad[site.part.neurons.to(device)]
            scaled = site.loadings.detach()[:, None] * dense
            expected = torch.zeros_like(site.vectors).index_add_(0, clusters, scaled)
            errors.append(relative(vectors[place.name], expected))
            products = (dense * site.vectors.detach()[clusters]).sum(1)
            errors.append(relative(loadings[place.name], products))
    return worst(errors)


def rounding_error(shape: Shape, device: torch.device) -> float:
    """Relative difference of the packed gradient, in the shape's dtype, from the same in fp64."""
    model = shape.model(device)
    found = []
    for twin, dtype in ((copy.deepcopy(model).double(), torch.float64), (model, torch.float32)):
        with trainable(twin, shape.selection(twin), dtype=dtype) as update:
            fill(update)
            batch_loss(twin, shape.micro_batch(), device).backward()
            found.append([*update.gradients().values(), *update.loading_gradients().values()])
    return worst(relative(a.double(), b) for b, a in zip(*found, strict=True))


def curve_error(shape: Shape, device: torch.device) -> float:
    """Largest relative difference of the losses of fifty steps from a dense masked AdamW's, fp64.

    Each neuron is a cluster of its own, so that masked rows are exactly what we train.
    """
    shape = replace(shape, n_clusters=shape.n_neurons)
    model = shape.model(device)
    selection, twin, batch = shape.selection(model), copy.deepcopy(model), shape.micro_batch()
    ours, theirs = [], []
    with trainable(model, selection, update="shared", dtype=torch.float64) as update:
        optimizer = NeuronAdamW(update, lr=1e-2)
        for _ in range(N_STEPS):
            optimizer.zero_grad()
            loss = batch_loss(model, batch, device)
            loss.backward()
            optimizer.step()
            ours.append(float(loss.detach()))
    masks = masked_weights(twin, selection)
    dense = torch.optim.AdamW(list(masks), lr=1e-2, weight_decay=0.0)
    for _ in range(N_STEPS):
        dense.zero_grad()
        loss = batch_loss(twin, batch, device)
        loss.backward()
        for weight, mask in masks.items():
            assert weight.grad is not None
            weight.grad *= mask
        dense.step()
        theirs.append(float(loss.detach()))
    return worst(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def fill(update: ClusterUpdate) -> None:
    """An update away from its start."""
    draw = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(update.packed.numel(), generator=draw)
    update.load_snapshot([update.packed.detach() + noise.to(update.packed)])


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN where one of them is, which `max` would pass over. None at all is NaN, too."""
    values = torch.tensor(list(errors), dtype=torch.float64)
    return float(values.max()) if len(values) else float("nan")
