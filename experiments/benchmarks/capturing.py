"""Capture: ours, a bare forward pass of the backbone, and nnsight saving the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.arms import Arm
from experiments.benchmarks.shapes import Shape
from nest.activations.capture import capture
from nest.conversations.batches import Batch, bucketed_batches, collate
from nest.conversations.encoders import CallableEncoder
from nest.models.layouts import find_sites

N_PROMPTS, SHORTEST, LONGEST, BATCH_SIZE = 16, 60, 120, 8


def prompts(shape: Shape, seed: int = 0) -> dict[str, list[int]]:
    """Token ids of random prompts of many lengths, by a name that stands for the text."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (N_PROMPTS,), generator=draw).tolist()
    return {
        f"prompt {i}": torch.randint(3, shape.vocabulary, (n,), generator=draw).tolist()
        for i, n in enumerate(lengths)
    }


def batches(texts: dict[str, list[int]]) -> list[Batch]:
    """The batches that capture makes of them."""
    encoded = list(texts.values())
    return [
        collate([encoded[i] for i in indices], None, 0)
        for indices in bucketed_batches([len(ids) for ids in encoded], BATCH_SIZE)
    ]


@contextmanager
def bare(shape: Shape, device: torch.device) -> Iterator[Arm]:
    """The backbone alone."""
    model, ready = shape.model(device), batches(prompts(shape))

    @torch.inference_mode()
    def step() -> None:
        for batch in ready:
            ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)

    yield Arm(step, 0)


@contextmanager
def ours(shape: Shape, device: torch.device) -> Iterator[Arm]:
    """`nest.activations.capture`: tokens, pooling, numbers on the host."""
    model, texts = shape.model(device), prompts(shape)
    sites, names = find_sites(model), list(texts)
    encoder = CallableEncoder(texts.__getitem__, pad_id=0)
    yield Arm(lambda: capture(model, encoder, names, sites, batch_size=BATCH_SIZE), 0)


@contextmanager
def nnsight(shape: Shape, device: torch.device, *, pooled: bool = False) -> Iterator[Arm]:
    """nnsight saves every site's output, or (`pooled`) only its maximum over tokens."""
    from nnsight import NNsight

    wrapped = NNsight(shape.model(device).base_model)
    ready = [(b.input_ids.to(device), b.attention_mask.to(device)) for b in batches(prompts(shape))]
    traced = pooled_in_trace if pooled else pooled_after_trace
    yield Arm(lambda: [traced(wrapped, ids, mask) for ids, mask in ready], 0)


@torch.inference_mode()
def pooled_after_trace(wrapped: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """One batch through nnsight: pooled activations (B, F) of every site, on the host."""
    saved: list[Tensor] = []
    with wrapped.trace(input_ids=ids, attention_mask=mask, use_cache=False):
        for layer in wrapped.layers:
            saved.append(layer.mlp.gate_proj.output.save())
            saved.append(layer.mlp.up_proj.output.save())
    hidden = ~mask.bool()[:, :, None]
    return [values.masked_fill(hidden, float("-inf")).amax(1).cpu() for values in saved]


@torch.inference_mode()
def pooled_in_trace(wrapped: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The same, pooled while the model runs, so that nothing large is kept."""
    hidden, least = ~mask.bool()[:, :, None], float("-inf")
    saved: list[Tensor] = []
    with wrapped.trace(input_ids=ids, attention_mask=mask, use_cache=False):
        for layer in wrapped.layers:
            saved.append(layer.mlp.gate_proj.output.masked_fill(hidden, least).amax(1).save())
            saved.append(layer.mlp.up_proj.output.masked_fill(hidden, least).amax(1).save())
    return [values.cpu() for values in saved]


@torch.inference_mode()
def pooled_by_hooks(model: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """What capture has to find, by plain hooks that keep everything."""
    seen: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        for layer in model.base_model.layers
        for module in (layer.mlp.gate_proj, layer.mlp.up_proj)
    ]
    try:
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    hidden = ~mask.bool()[:, :, None]
    return [values.masked_fill(hidden, float("-inf")).amax(1).cpu() for values in seen]


def gate(shape: Shape, device: torch.device, *, rival: bool = False) -> bool:
    """Whether our pooled activations, and with `rival` nnsight's, are those of plain hooks.

    To the rounding of the weights' dtype.
    """
    model, texts = shape.model(device), prompts(shape)
    encoder, sites = CallableEncoder(texts.__getitem__, pad_id=0), find_sites(model)
    captured = capture(model, encoder, list(texts), sites, batch_size=BATCH_SIZE)
    lengths = [len(ids) for ids in texts.values()]
    bound = 1e-5 if shape.dtype == torch.float32 else 0.05
    for indices, batch in zip(bucketed_batches(lengths, BATCH_SIZE), batches(texts), strict=True):
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        expected = pooled_by_hooks(model, ids, mask)
        found = [[torch.from_numpy(values[indices]) for values in captured.pooled]]
        if rival:
            from nnsight import NNsight

            wrapped = NNsight(model.base_model)
            found.append(pooled_after_trace(wrapped, ids, mask))
            found.append(pooled_in_trace(wrapped, ids, mask))
        for pooled in found:
            for a, b in zip(pooled, expected, strict=True):
                if not torch.allclose(a.float(), b.float(), atol=bound):
                    return False
    return True


ARMS = {"bare": bare, "capture": ours, "nnsight": nnsight}
