"""Streaming capture: one pooled number a neuron and prompt, through forward hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from nest.activations.config import Pool
from nest.activations.reader import Fault, hooked
from nest.activations.store import ActivationStore, SpillFolder
from nest.activations.taps import SiteTap, Tap, as_tap
from nest.artifacts.unfinished import Unfinished
from nest.conversations.batches import bucketed_batches
from nest.conversations.conversation import Prompt, as_conversation
from nest.conversations.encoders import Encoder
from nest.errors import ActivationError, InputError
from nest.models.calls import run_model
from nest.models.sites import NeuronSite
from nest.progress import ProgressCallback


@dataclass(frozen=True)
class Activations:
    """Pooled activations of all sites over a list of prompts.

    Attributes:
        taps: Where they were read, in the order of `pooled`.
        pooled: For each site an fp32 array (B, F), prompts in the order they were given; an array on
            disk where they were too many for memory.
        folder: Holds the temporary files, which go when this object does; None when in memory.
    """

    taps: tuple[Tap, ...]
    pooled: tuple[NDArray[np.float32], ...]
    folder: SpillFolder | None = None

    @property
    def sites(self) -> tuple[NeuronSite, ...]:
        """The sites among the taps."""
        return tuple(tap.site for tap in self.taps if isinstance(tap, SiteTap))


def capture(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    sites: Sequence[NeuronSite | Tap],
    *,
    pool: Pool = "max",
    batch_size: int = 32,
    memory_bound_bytes: int = 2 * 1024**3,
    progress: ProgressCallback | None = None,
    sequences: Sequence[Sequence[int]] | None = None,
    work: Unfinished | None = None,
) -> Activations:
    """Run the prompts through the model and keep one pooled number a neuron.

    Nothing of size B x T x F outlives its module's hook. After the first batch, which shows the order
    of the sites' modules, the model is run up to the last of them only. It is left as it was.

    Args:
        model: Any module with these sites; a transformers model runs without its head, and no model
            runs further than its last site.
        encoder: Turns a prompt into token ids, generation prompt included.
        prompts: At least one.
        sites: Where to read: neurons, or other taps such as the residual stream.
        pool: How tokens become one number.
        batch_size: Prompts a forward pass, taken in order of length so that little is padded.
        memory_bound_bytes: Past this the pooled activations go to a temporary file.
        progress: Called with stage, prompts done and prompts in all.
        sequences: The prompts' token ids, where they are known already.
        work: Keeps what is captured, so that a later run goes on after the last batch that is in it.

    Raises:
        InputError: no prompts, or one longer than the model's context.
        ActivationError: NaN or infinite activations; names the site.
    """
    if not prompts:
        raise InputError("there are no prompts to capture; give at least one of each kind")
    if sequences is None:
        sequences = [encoder.prompt(prompt) for prompt in prompts]
    batches = [
        _Batch.of(indices, sequences, encoder.pad_id)
        for indices in bucketed_batches([len(ids) for ids in sequences], batch_size)
    ]
    taps = [as_tap(place) for place in sites]
    store = ActivationStore.open(taps, len(prompts), memory_bound_bytes, work)
    backbone, device = _backbone(model), _device_of(model)
    n_kept = store.n_kept_batches
    done = sum(len(batch.indices) for batch in batches[:n_kept])

    with hooked(model, taps, pool) as reader, torch.inference_mode():

        def run(batch: _Batch) -> None:
            mask = batch.mask.to(device, non_blocking=True)
            input_ids = batch.input_ids.to(device, non_blocking=True)
            reader.expect(mask.bool(), batch.n_full)
            reader.run(lambda: run_model(backbone, input_ids, mask, use_cache=False))

        def finish(batch: _Batch, copy: _Copy) -> None:
            nonlocal done
            pooled, is_finite = copy.landed()
            fault = None if is_finite else _fault_in(pooled, taps)
            if not is_finite and fault is None:  # what it was, the pooling hid
                with reader.looking_closely():
                    run(batch)
                fault = reader.fault
            if fault is not None:
                asked = as_conversation(prompts[batch.indices[fault.row]]).asked
                raise ActivationError(
                    f"the activations at {fault.tap} are not finite numbers (first seen for the prompt "
                    f"{asked[:60]!r}); try --dtype float32, or check that the checkpoint is not damaged"
                )
            store.write(batch.indices, pooled)
            store.keep(last=batch is batches[-1])
            done += len(batch.indices)
            if progress:
                progress("capture activations", done, len(prompts))

        waiting: tuple[_Batch, _Copy] | None = None
        for batch in batches[n_kept:]:
            run(batch)
            copy = _Copy(torch.cat(reader.take(taps), dim=1), reader.take_checks())
            if waiting is not None:  # its copy travelled while this batch was started
                finish(*waiting)
            waiting = batch, copy
        if waiting is not None:
            finish(*waiting)
    return Activations(tuple(taps), store.pooled, store.folder)


def _fault_in(pooled: NDArray[np.float32], taps: Sequence[Tap]) -> Fault | None:
    """The first tap with a pooled activation that is not finite."""
    start = 0
    for tap in taps:
        bad = ~np.isfinite(pooled[:, start : start + tap.length]).all(axis=1)
        if bad.any():
            return Fault(tap.name, int(bad.argmax()))
        start += tap.length
    return None


class _Batch(NamedTuple):
    """Prompts padded on the right; `n_full` of the columns hold no padding."""

    indices: list[int]
    input_ids: Int[Tensor, "B T"]
    mask: Int[Tensor, "B T"]
    n_full: int

    @staticmethod
    def of(indices: list[int], sequences: Sequence[Sequence[int]], pad_id: int) -> _Batch:
        lengths = [len(sequences[index]) for index in indices]
        longest = max(lengths)
        rows = [[*sequences[i], *[pad_id] * (longest - len(sequences[i]))] for i in indices]
        mask = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
        return _Batch(indices, torch.tensor(rows), mask.long(), min(lengths))


class _Copy:
    """A batch's pooled activations on their way to the host, all sites side by side."""

    def __init__(self, pooled: Float[Tensor, "B F"], checks: Float[Tensor, " S"]) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = [pooled, checks]
        if pooled.is_cuda:
            # pinned, so that the copy runs beside the next batch; it is waited for in `landed`
            self._host = [_pinned_copy(values) for values in (pooled, checks)]
            self._event = torch.cuda.current_stream(pooled.device).record_event()
        elif pooled.device.type != "cpu":
            self._host = [pooled.cpu(), checks.cpu()]

    def landed(self) -> tuple[NDArray[np.float32], bool]:
        """(B, F of all sites), and whether the checks are finite; waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        pooled, checks = (values.numpy() for values in self._host)
        return pooled, bool(np.isfinite(checks).all())


def _pinned_copy(values: Tensor) -> Tensor:
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


def _backbone(model: nn.Module) -> nn.Module:
    """A transformers model without its head: its logits are not needed here."""
    backbone = getattr(model, "base_model", None)
    return backbone if isinstance(backbone, nn.Module) else model


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
