"""Streaming capture: one pooled number a neuron and prompt, through forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from nest.activations.config import Pool
from nest.activations.pooling import full_columns, pool_tokens
from nest.activations.store import ActivationStore, SpillFolder
from nest.artifacts.unfinished import Unfinished
from nest.conversations.batches import bucketed_batches
from nest.conversations.conversation import Prompt, as_conversation
from nest.conversations.encoders import Encoder
from nest.errors import ActivationError, InputError, LayoutError
from nest.models.binding import bind_all
from nest.models.calls import run_model
from nest.models.modes import eval_mode
from nest.models.partial import run_until
from nest.models.sites import NeuronSite
from nest.progress import ProgressCallback


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


def capture(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    sites: Sequence[NeuronSite],
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
        sites: Where to read.
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
    store = ActivationStore.open(sites, len(prompts), memory_bound_bytes, work)
    backbone, device = _backbone(model), _device_of(model)
    n_kept = store.n_kept_batches
    done = sum(len(batch.indices) for batch in batches[:n_kept])

    with hooked(model, sites, pool) as reader, torch.inference_mode():

        def run(batch: _Batch) -> None:
            mask = batch.mask.to(device, non_blocking=True)
            input_ids = batch.input_ids.to(device, non_blocking=True)
            reader.expect(mask.bool(), batch.n_full)
            reader.run(lambda: run_model(backbone, input_ids, mask, use_cache=False))

        def finish(batch: _Batch, copy: _Copy) -> None:
            nonlocal done
            pooled, is_finite = copy.landed()
            fault = None if is_finite else _fault_in(pooled, sites)
            if not is_finite and fault is None:  # what it was, the pooling hid
                with reader.looking_closely():
                    run(batch)
                fault = reader.fault
            if fault is not None:
                asked = as_conversation(prompts[batch.indices[fault.row]]).asked
                raise ActivationError(
                    f"the activations at {fault.site} are not finite numbers (first seen for the prompt "
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
            copy = _Copy(torch.cat(reader.take(sites), dim=1), reader.take_checks())
            if waiting is not None:  # its copy travelled while this batch was started
                finish(*waiting)
            waiting = batch, copy
        if waiting is not None:
            finish(*waiting)
    return Activations(tuple(sites), store.pooled, store.folder)


class Fault(NamedTuple):
    """Where activations are not finite: the site's name and the row of the batch."""

    site: str
    row: int


class Reader:
    """Pools what the hooks see; `expect` comes before each forward pass, `take` after it.

    Attributes:
        fault: Where activations of a prompt's own tokens were not finite, when looked at closely.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool: Pool = pool
        self.mask: Bool[Tensor, "B T"] | None = None
        self._looks_closely = False
        self.fault: Fault | None = None
        self._n_full = 0
        self._pooled: dict[str, Tensor] = {}
        self._checks: list[Tensor] = []
        self._n_sites = -1
        self._ran: list[nn.Module] = []
        self._last: nn.Module | None = None

    def expect(self, mask: Bool[Tensor, "B T"], n_full: int | None = None) -> None:
        """Announce the next batch by its mask, and by `full_columns(mask)` where it is known."""
        self.mask = mask
        self._n_full = full_columns(mask) if n_full is None else n_full

    def run(self, call: Callable[[], object]) -> None:
        """Run the model by `call`: the first time to its end, later up to the last site's module.

        Which module is the last is learned the first time. A model that runs one of them twice is
        always run to its end, and so is a batch whose modules come in another order.
        """
        if self._last is not None:
            self._forget()
            if run_until(self._last, call) and len(self._pooled) == self._n_sites:
                return
        self._forget()
        call()
        self._n_sites = len(self._pooled)
        self._last = self._ran[-1] if len(set(self._ran)) == len(self._ran) > 0 else None

    def ran(self, module: nn.Module) -> None:
        """Note that a module with sites ran."""
        self._ran.append(module)

    def update(self, site: NeuronSite, output: Tensor) -> None:
        """Pool one site's output of the current batch."""
        mask = self.mask
        assert mask is not None
        if output.ndim == 2:  # some layers see their tokens flattened (OPT's)
            output = output.unflatten(0, tuple(mask.shape))
        values = output
        if site.length != output.shape[-1]:
            values = output[..., site.offset : site.offset + site.length]
        if mask.device != values.device:
            mask = mask.to(values.device)
        if self._looks_closely and self.fault is None:
            self.fault = _fault_at(site, values, mask)
        pooled = pool_tokens(values, mask, self.pool, n_full=self._n_full)
        self._pooled[site.name] = pooled
        # A sum is not finite where one of its terms is not. The maximum hides a lone -inf, so that
        # all tokens are summed: 15 to 25 us at 32 prompts of 15 to 30 tokens and 384 neurons, where
        # the maximum takes 30 to 40, a minimum as much and `aminmax` 640 to 970.
        seen = values if self.pool == "max" else pooled
        self._checks.append(seen.sum(dtype=torch.float32))

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
        device = pooled[0].device  # a model over several devices has its sites on several
        return [values.to(device) for values in pooled]

    def take_checks(self) -> Float[Tensor, " S"]:
        """A sum for each site, which are finite only if all of its activations are; forgotten then.

        A sum that is not finite proves nothing: it may be of padding, or too large.
        """
        device = self._checks[0].device
        checks = torch.stack([check.to(device) for check in self._checks])
        self._checks = []
        return checks

    @contextmanager
    def looking_closely(self) -> Iterator[None]:
        """Within, every activation is looked at, and the first `fault` kept."""
        self._looks_closely, self.fault = True, None
        try:
            yield
        finally:
            self._looks_closely = False

    def _forget(self) -> None:
        self._pooled, self._checks, self._ran = {}, [], []


@contextmanager
def hooked(model: nn.Module, sites: Sequence[NeuronSite], pool: Pool) -> Iterator[Reader]:
    """Forward hooks on the sites' modules for the time of the block."""
    reader = Reader(pool)
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def hook_for(own: Sequence[NeuronSite]) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            reader.ran(module)
            for site in own:
                reader.update(site, output)

        return hook

    by_module: dict[nn.Module, list[NeuronSite]] = {}
    for bound in bind_all(model, sites):
        by_module.setdefault(bound.module, []).append(bound.site)
    with eval_mode(model):
        try:
            for module, own in by_module.items():
                handles.append(module.register_forward_hook(hook_for(own)))
            yield reader
        finally:
            for handle in handles:
                handle.remove()


def _fault_at(
    site: NeuronSite, values: Float[Tensor, "B T F"], mask: Bool[Tensor, "B T"]
) -> Fault | None:
    rows = (~values.isfinite().all(dim=2) & mask).any(dim=1).nonzero()
    return Fault(site.name, int(rows[0])) if len(rows) else None


def _fault_in(pooled: NDArray[np.float32], sites: Sequence[NeuronSite]) -> Fault | None:
    """The first site with a pooled activation that is not finite."""
    start = 0
    for site in sites:
        bad = ~np.isfinite(pooled[:, start : start + site.length]).all(axis=1)
        if bad.any():
            return Fault(site.name, int(bad.argmax()))
        start += site.length
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
