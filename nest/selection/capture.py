"""Streaming capture: one pooled number a neuron and prompt, through forward hooks."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn

from nest.errors import ActivationError, InputError, LayoutError
from nest.models.chat import Encoder, bucketed_batches, collate, run_model
from nest.models.sites import NeuronSite, site_module
from nest.selection.config import Pool

ProgressCallback = Callable[[str, int, int], None]


class SpillFolder:
    """A temporary folder that goes when this object does, at the latest when Python ends."""

    def __init__(self) -> None:
        self.name = tempfile.mkdtemp(prefix="nest-activations-")
        weakref.finalize(self, shutil.rmtree, self.name, ignore_errors=True)


@dataclass(frozen=True)
class Activations:
    """Pooled activations of all sites over a list of prompts.

    Attributes:
        sites: The sites, in the order of `pooled`.
        pooled: For each site an fp32 array (B, F), prompts in the order they were given; an array on
            disk where they were too many for memory.
        folder: Holds the temporary files, which go when this object does; None when in memory.
    """

    sites: tuple[NeuronSite, ...]
    pooled: tuple[NDArray[np.float32], ...]
    folder: SpillFolder | None = None


def pool_tokens(
    values: Float[Tensor, "B T F"],
    mask: Bool[Tensor, "B T"],
    pool: Pool,
    *,
    n_full: int | None = None,
) -> Float[Tensor, "B F"]:
    """One number a neuron and prompt, padding left out.

    Args:
        values: Activations at every token.
        mask: True at the prompt's own tokens; at least one a row.
        pool: `max` (the paper's), `mean`, or `last` (the last own token).
        n_full: `full_columns(mask)`, where it is known already.

    Returns:
        Pooled activations in fp32.

    Source: arXiv 2602.16835, section 3.2 (max over the prompt's tokens).
    """
    if pool == "max":
        # Padding stands on the right, so most columns are full; only the others need a masked copy.
        if n_full is None:
            n_full = full_columns(mask)
        if n_full == mask.shape[1]:
            return values.amax(dim=1).float()
        tail = values[:, n_full:].masked_fill(~mask[:, n_full:, None], float("-inf")).amax(dim=1)
        if n_full == 0:
            return tail.float()
        return torch.maximum(values[:, :n_full].amax(dim=1), tail).float()
    padded = not bool(mask.all())
    if pool == "mean":
        weights = mask.to(torch.float32)
        kept = values.float().masked_fill(~mask[:, :, None], 0.0) if padded else values.float()
        return kept.sum(dim=1) / weights.sum(dim=1, keepdim=True)
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last = positions.masked_fill(~mask, -1).amax(dim=1)  # (B,)
    return values[torch.arange(values.shape[0], device=values.device), last].float()


def capture(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[str],
    sites: Sequence[NeuronSite],
    *,
    pool: Pool = "max",
    batch_size: int = 32,
    memory_bound_bytes: int = 2 * 1024**3,
    progress: ProgressCallback | None = None,
) -> Activations:
    """Run the prompts through the model and keep one pooled number a neuron.

    Nothing of size B x T x F outlives its batch. The model is left as it was.

    Args:
        model: Any module with these sites; a transformers model runs without its head.
        encoder: Turns a prompt into token ids, generation prompt included.
        prompts: At least one.
        sites: Where to read.
        pool: How tokens become one number.
        batch_size: Prompts a forward pass, taken in order of length so that little is padded.
        memory_bound_bytes: Past this the pooled activations go to a temporary file.
        progress: Called with stage, prompts done and prompts in all.

    Raises:
        InputError: no prompts, or one longer than the model's context.
        ActivationError: NaN or infinite activations; names the site.
    """
    if not prompts:
        raise InputError("there are no prompts to capture; give at least one of each kind")
    sequences = [encoder.prompt(prompt) for prompt in prompts]
    store = _Store.open(sites, len(prompts), memory_bound_bytes)
    device = _device_of(model)
    done = 0
    with hooked(model, sites, pool) as reader, torch.inference_mode():
        for indices in bucketed_batches([len(ids) for ids in sequences], batch_size):
            batch = collate([sequences[i] for i in indices], None, encoder.pad_id)
            mask = batch.attention_mask.to(device)
            reader.expect(mask.bool())
            run_model(_backbone(model), batch.input_ids.to(device), mask, use_cache=False)
            for array, site, values in zip(store.pooled, sites, reader.take(sites), strict=True):
                # A sum is one pass; only where it is not finite are the values looked at.
                if not math.isfinite(float(values.sum())) and not bool(values.isfinite().all()):
                    raise ActivationError(
                        f"the activations at {site.name} are not finite numbers (first seen for the "
                        f"prompt {prompts[indices[0]][:60]!r} and its batch); try --dtype float32, or "
                        "check that the checkpoint is not damaged"
                    )
                array[indices] = values.cpu().numpy()
            done += len(indices)
            if progress:
                progress("capture activations", done, len(prompts))
    return Activations(tuple(sites), store.pooled, store.folder)


def full_columns(mask: Bool[Tensor, "B T"]) -> int:
    """How many of the first tokens are no padding in any row."""
    return int(mask.all(dim=0).long().cumprod(dim=0).sum())


class Reader:
    """Pools what the hooks see; `expect` comes before each forward pass."""

    def __init__(self, pool: Pool) -> None:
        self.pool: Pool = pool
        self.mask: Bool[Tensor, "B T"] | None = None
        self._n_full = 0
        self._pooled: dict[str, Tensor] = {}

    def expect(self, mask: Bool[Tensor, "B T"]) -> None:
        """Announce the next batch by its mask."""
        self.mask, self._n_full = mask, full_columns(mask)

    def update(self, site: NeuronSite, output: Tensor) -> None:
        """Pool one site's output of the current batch."""
        assert self.mask is not None
        if output.ndim == 2:  # some layers see their tokens flattened (OPT's)
            output = output.unflatten(0, tuple(self.mask.shape))
        values = output[..., site.offset : site.offset + site.length]
        self._pooled[site.name] = pool_tokens(
            values, self.mask.to(values.device), self.pool, n_full=self._n_full
        )

    def take(self, sites: Sequence[NeuronSite]) -> list[Float[Tensor, "B F"]]:
        """The pooled activations of the last forward pass, which are then forgotten.

        Raises:
            LayoutError: a site's module did not run.
        """
        missing = [site.name for site in sites if site.name not in self._pooled]
        if missing:
            raise LayoutError(
                f"the modules {', '.join(missing)} did not run in the forward pass; name modules that "
                "the model calls with layout=[nest.NeuronSite(...)]"
            )
        pooled = [self._pooled[site.name] for site in sites]
        self._pooled = {}
        return pooled


@contextmanager
def hooked(model: nn.Module, sites: Sequence[NeuronSite], pool: Pool) -> Iterator[Reader]:
    """Forward hooks on the sites' modules for the time of the block."""
    reader = Reader(pool)
    handles: list[torch.utils.hooks.RemovableHandle] = []
    training = [module for module in model.modules() if module.training]

    def hook_for(site: NeuronSite) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: reader.update(site, output)

    try:
        model.eval()
        for site in sites:
            handles.append(site_module(model, site).register_forward_hook(hook_for(site)))
        yield reader
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


@dataclass(frozen=True)
class _Store:
    pooled: tuple[NDArray[np.float32], ...]
    folder: SpillFolder | None

    @staticmethod
    def open(sites: Sequence[NeuronSite], n_prompts: int, bound_bytes: int) -> _Store:
        if sum(4 * n_prompts * site.length for site in sites) <= bound_bytes:
            arrays = [np.zeros((n_prompts, site.length), dtype=np.float32) for site in sites]
            return _Store(tuple(arrays), None)
        folder = SpillFolder()
        files = [
            np.memmap(
                Path(folder.name) / f"{i}.f32", np.float32, "w+", shape=(n_prompts, site.length)
            )
            for i, site in enumerate(sites)
        ]
        return _Store(tuple(files), folder)


def _backbone(model: nn.Module) -> nn.Module:
    """A transformers model without its head: its logits are not needed here."""
    backbone = getattr(model, "base_model", None)
    return backbone if isinstance(backbone, nn.Module) else model


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
