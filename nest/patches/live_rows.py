"""The selected rows of a model in memory: read, written, and put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nest.errors import LayoutError, PatchError
from nest.models.binding import bind
from nest.models.sites import neuron_view
from nest.selection.selection import NeuronSelection

# Odd constants of about 64 bits, so that every bit of a row and its place tell in the checksum.
_COLUMN_FACTOR, _ROW_FACTOR = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9
_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class LiveBatch:
    """Rows of sites whose weights are of one dtype, width and device; they are computed at once.

    Attributes:
        indices: Which sites of the selection.
        views: Of each site its weight's memory (F, D), one neuron a row.
        neurons: Of each site the chosen rows, int64 (N,), on the weights' device.
        numbers: Of each row of the batch its place among all rows of the selection.
    """

    indices: tuple[int, ...]
    views: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]
    numbers: Int[Tensor, " R"]

    def read(self) -> Float[Tensor, "R D"]:
        """A copy of the rows as they are now."""
        pairs = zip(self.views, self.neurons, strict=True)
        return torch.cat([view.index_select(0, neurons) for view, neurons in pairs])

    def write(self, rows: Float[Tensor, "R D"]) -> None:
        """Replace the rows in place."""
        with torch.no_grad():
            for view, neurons, own in zip(self.views, self.neurons, self.split(rows), strict=True):
                view.index_copy_(0, neurons, own)

    def split(self, rows: Float[Tensor, "R D"]) -> tuple[Tensor, ...]:
        """The rows site by site."""
        return tuple(rows.split([len(neurons) for neurons in self.neurons]))


class LiveRows:
    """The selected rows of a model, found once.

    Attributes:
        batches: They.

    Raises:
        PatchError: the model has no such weight, or one of another shape.
    """

    def __init__(self, model: nn.Module, selection: NeuronSelection) -> None:
        weights = touched_weights(model, selection)
        groups: dict[tuple[torch.dtype, torch.device, int], list[int]] = {}
        first, starts = 0, []
        for i, part in enumerate(selection.sites):
            weight = weights[part.site.parameter]
            groups.setdefault((weight.dtype, weight.device, part.width), []).append(i)
            starts.append(first)
            first += len(part.neurons)
        self.batches = tuple(
            self._batch(selection, weights, starts, indices) for indices in groups.values()
        )

    @staticmethod
    def _batch(
        selection: NeuronSelection,
        weights: dict[str, Tensor],
        starts: Sequence[int],
        indices: Sequence[int],
    ) -> LiveBatch:
        parts = [selection.sites[i] for i in indices]
        home = weights[parts[0].site.parameter].device
        numbers = [
            torch.arange(starts[i], starts[i] + len(part.neurons))
            for i, part in zip(indices, parts, strict=True)
        ]
        return LiveBatch(
            indices=tuple(indices),
            views=tuple(neuron_view(weights[p.site.parameter], p.site) for p in parts),
            neurons=tuple(part.neurons.to(home) for part in parts),
            numbers=torch.cat(numbers).to(home),
        )

    def read(self) -> list[Tensor]:
        """A copy of the rows as they are now, batch by batch."""
        return [batch.read() for batch in self.batches]

    def write(self, rows: Sequence[Tensor]) -> None:
        """Replace the rows in place."""
        for batch, own in zip(self.batches, rows, strict=True):
            batch.write(own)

    def checksum(self, rows: Sequence[Tensor]) -> int:
        """Of all rows, batch by batch; see `checksum`."""
        pairs = zip(self.batches, rows, strict=True)
        return sum(checksum(own, batch.numbers) for batch, own in pairs) % 2**64

    @contextmanager
    def restored(self, rows: Sequence[Tensor], *, always: bool) -> Iterator[None]:
        """Put `rows` back after the block; unless `always`, only if it does not end well."""
        try:
            yield
        except BaseException:
            self.write(rows)
            raise
        if always:
            self.write(rows)


def touched_weights(model: nn.Module, selection: NeuronSelection) -> dict[str, Tensor]:
    """The touched weights of a model, by parameter.

    Raises:
        PatchError: the model has no such weight, or one of another shape.
    """
    weights: dict[str, Tensor] = {}
    for part in selection.sites:
        try:
            weight = bind(model, part.site).weight
        except LayoutError as fault:
            raise PatchError(f"the patch is of another model: {fault}") from None
        if weight.shape[1 - part.site.axis] != part.width:
            raise PatchError(
                f"the patch is of another model: the rows of {part.site.parameter} have "
                f"{weight.shape[1 - part.site.axis]} entries, those of the patch {part.width}"
            )
        if weight.device.type == "meta" or weight.element_size() not in _SAME_SIZE:
            raise PatchError(
                f"{part.site.parameter} is {weight.dtype} on {weight.device}: a patch changes weights that "
                "are in memory in float16, bfloat16, float32 or float64; load the model so"
            )
        weights[part.site.parameter] = weight
    return weights


def checksum(rows: Float[Tensor, "R D"], numbers: Int[Tensor, " R"]) -> int:
    """A number of 64 bits that changes with any bit of any row, and with its place.

    Integer arithmetic that wraps around: the same on every device, and the sum over parts, modulo
    2^64, is that of the whole. It tells damage and confusion, not malice; `nest verify` compares sha256
    of whole tensors.

    Args:
        rows: In the weights' dtype.
        numbers: Place of each row among all rows of the selection.
    """
    rows = rows.contiguous()
    # Eight bytes at a time where rows divide into them.
    whole = rows.shape[1] * rows.element_size() % 8 == 0
    bits = rows.view(torch.int64 if whole else _SAME_SIZE[rows.element_size()])
    columns = torch.arange(bits.shape[1], device=rows.device)
    by_row = (bits * (columns * 2 + 1).mul_(_COLUMN_FACTOR)).sum(1)  # (R,), int64
    return int((by_row * (numbers * 2 + 1).mul_(_ROW_FACTOR)).sum()) % 2**64
