"""Hidden states below the lowest tuned block: they never change, so each is computed once.

Where the lowest tuned block is not the first, everything under it is frozen input. The hidden states
that enter it are kept for each dialogue, in memory up to a bound and in a temporary file beyond it,
and every later pass (training, validation, the base model for the KL term) begins there.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nest.models.blocks import Blocks, started_at
from nest.models.calls import run_model
from nest.models.partial import run_until
from nest.tuning.company import FirstCompany
from nest.tuning.dialogues import Example, MicroBatch
from nest.tuning.memory import is_out_of_memory

# Hidden states in memory take up to this much; what is beyond it goes to a temporary file.
MEMORY_BOUND_BYTES = 2 * 1024**3
# How far logits through the cache may be from the model's own, in units in the last place of the largest.
# Both passes have the same shapes: on Llama, GPT-NeoX and OPT they agreed to the last bit in every dtype.
TOLERANCE_ULPS = 2


class HiddenStates:
    """Hidden states of dialogues, one tensor (T, D) each, in memory and past a bound on disk.

    Args:
        bound_bytes: Most bytes in memory.
        warn: Told when the disk takes no more; what does not fit is computed again when needed.
    """

    def __init__(self, bound_bytes: int, warn: Callable[[str], None]) -> None:
        self._bound_bytes, self._kept_bytes, self._warn = bound_bytes, 0, warn
        self._kept: dict[Example, Tensor] = {}
        self._places: dict[Example, tuple[int, tuple[int, ...], torch.dtype]] = {}
        self._file: Any = None
        self._end = 0
        self._full = False

    def __contains__(self, example: Example) -> bool:
        return example in self._kept or example in self._places

    def add(self, example: Example, states: Float[Tensor, "T D"]) -> None:
        """Keep a copy on the CPU."""
        states = states.detach().to("cpu", copy=True)
        size = states.numel() * states.element_size()
        if self._kept_bytes + size <= self._bound_bytes:
            self._kept[example] = states
            self._kept_bytes += size
        elif not self._full:
            self._spill(example, states)

    def get(self, example: Example) -> Float[Tensor, "T D"]:
        """What `add` was given, on the CPU."""
        if example in self._kept:
            return self._kept[example]
        offset, shape, dtype = self._places[example]
        values = os.pread(self._file.fileno(), torch.Size(shape).numel() * dtype.itemsize, offset)
        return torch.frombuffer(bytearray(values), dtype=dtype).view(shape)

    def _spill(self, example: Example, states: Tensor) -> None:
        data = states.contiguous().flatten().view(torch.uint8).numpy().data
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(  # noqa: SIM115 - closed with this object
                    prefix="nest-hidden-states-", buffering=0
                )
                weakref.finalize(self, self._file.close)
            written = 0
            while written < len(data):
                written += os.pwrite(self._file.fileno(), data[written:], self._end + written)
        except OSError as fault:
            self._full = True
            self._warn(
                f"hidden states no longer fit on the disk ({fault}); the rest is computed anew in every "
                "epoch, which takes longer. Set TMPDIR to a larger disk"
            )
            return
        self._places[example] = (self._end, tuple(states.shape), states.dtype)
        self._end += len(data)


class FrozenPrefix:
    """The part of a model below its lowest tuned block, run once for each dialogue.

    Args:
        model: Any module whose blocks are in one list.
        blocks: They; `lowest` is at least 1.
        device: Where batches go.
        bound_bytes: Of hidden states in memory.
        warn: Told what deserves attention.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        device: torch.device,
        *,
        bound_bytes: int = MEMORY_BOUND_BYTES,
        warn: Callable[[str], None],
    ) -> None:
        self._model, self._blocks, self._device = model, blocks, device
        self._states = HiddenStates(bound_bytes, warn)
        self._earlier = FirstCompany()
        self._as_tuple = False

    def met(self, examples: Sequence[Example]) -> None:
        """Take note of dialogues that an earlier run has put through together; nothing is computed."""
        new = [e for e in examples if e not in self._states and e not in self._earlier]
        if new:
            self._earlier.add(new, new)

    @contextmanager
    def skipped(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Inside the block the model's forward pass on this batch begins at the lowest tuned block."""
        states = self._entering(micro_batch).to(self._device)
        with started_at(self._blocks, self._blocks.lowest, states, as_tuple=self._as_tuple):
            yield

    def agrees(self, micro_batch: MicroBatch, ask: Callable[[MicroBatch], Tensor]) -> bool:
        """Whether logits through the cache are the model's own, up to rounding.

        They are not, or cannot be computed, where a block looks back past the one below it.
        """
        with torch.no_grad():
            expected = ask(micro_batch)
            try:
                self._entering(micro_batch)
                # What frozen blocks leave lying about for later ones is now another dialogue's.
                ask(MicroBatch.of(micro_batch.examples[-1:], micro_batch.pad_id))
                with self.skipped(micro_batch):
                    found = ask(micro_batch)
            except (RuntimeError, LookupError, AttributeError, ValueError) as fault:
                if is_out_of_memory(fault):
                    raise
                return False
        ulp = torch.finfo(found.dtype).eps * float(expected.abs().max())
        return bool(((found - expected).abs() <= TOLERANCE_ULPS * ulp).all())

    def _entering(self, micro_batch: MicroBatch) -> Float[Tensor, "B T D"]:
        """Hidden states that enter the lowest tuned block; zeros at padding."""
        for group in self._earlier.due(micro_batch.examples):
            again = self._computed(group, micro_batch.pad_id)
            for example in self._earlier.take(group):
                self._states.add(example, again[example])
        missing = [e for e in micro_batch.examples if e not in self._states]
        fresh = self._computed(missing, micro_batch.pad_id) if missing else {}
        for example, values in fresh.items():
            self._states.add(example, values)
        rows = [
            fresh[example] if example in fresh else self._states.get(example)
            for example in micro_batch.examples
        ]
        # Causal attention never reaches padding on the right, so what stands there plays no part.
        return nn.utils.rnn.pad_sequence([row.to(self._device) for row in rows], batch_first=True)

    @torch.no_grad()
    def _computed(self, examples: Sequence[Example], pad_id: int) -> dict[Example, Tensor]:
        batch = MicroBatch.of(examples, pad_id).batch
        below = self._blocks.modules[self._blocks.lowest - 1]
        caught: list[Tensor] = []

        def catch(_module: nn.Module, _args: Any, output: Any) -> None:
            self._as_tuple = isinstance(output, tuple)
            states = output[0] if self._as_tuple else output
            if not isinstance(states, Tensor):
                raise ValueError(f"blocks that return {type(states).__name__} cannot be skipped")
            caught.append(states)

        handle = below.register_forward_hook(catch)
        try:
            ids, mask = batch.input_ids.to(self._device), batch.attention_mask.to(self._device)
            run_until(below, lambda: run_model(self._model, ids, mask, use_cache=False))
        finally:
            handle.remove()
        (states,) = caught
        return {e: states[row, : len(e.ids)] for row, e in enumerate(examples)}
