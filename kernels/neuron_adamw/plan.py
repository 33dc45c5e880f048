"""The index tables of one launch: which program owns which numbers of which rows. Plain torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from nest_kernels.neuron_adamw.site_rows import SiteRows

BLOCK_D = 256
"""Numbers of a row that one program owns."""

SLICE_ROWS = 16
"""Rows that one program writes, at most. Clusters with more are cut into slices of equal size, so that
few large clusters fill a GPU, too. 16 x 256 numbers are 32 a thread."""

FIELDS = (
    "first_row",  # of the slice, in `rows`
    "n_rows",
    "column_stride",  # of the weight, in elements
    "aligned",  # 1: unit column stride, and rows and originals begin at multiples of 16 bytes
    "vector",  # where the cluster's vector begins in the packed parameters
    "width",  # D
    "n_siblings",  # slices with the same vector, this one included
    "block_counter",  # the vector's first counter; it has one for each block of D
)
"""Columns of `LaunchPlan.slices`."""

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class LaunchPlan:
    """What one launch works on: all the groups of vectors whose weights are of one dtype.

    A slice is up to `SLICE_ROWS` rows of one cluster at one site; a vector without rows has one
    empty slice. A program is one block of D of one slice.

    Rows of separate tensors are reached by int64 element offsets from one base pointer, which may
    be negative. The tensors behind the offsets are kept alive by `sites`.

    Attributes:
        sites: What the plan was made for.
        weights: Base of the weights' offsets.
        originals: Base of the originals' offsets.
        slices: One row of `FIELDS` a slice, int64.
        rows: Offset of each row in the weights, in the originals, and of its loading in the packed
            parameters (-1: none); slice by slice, int64 (3, R).
        counters: Zeros before and after each launch, int32: one for all slices, one for each slice,
            one for each block of each vector.
        n_blocks: Blocks of D of the widest vector.
        strided: Whether any slice is not `aligned`.
    """

    sites: tuple[SiteRows, ...]
    weights: Tensor
    originals: Tensor
    slices: Int[Tensor, "S fields"]
    rows: Int[Tensor, "3 R"]
    counters: Int[Tensor, " C"]
    n_blocks: int
    strided: bool

    @property
    def n_programs(self) -> int:
        return len(self.slices) * self.n_blocks

    @staticmethod
    def of(sites: Sequence[SiteRows]) -> LaunchPlan:
        """The plan for sites whose weights are of one dtype and on one device."""
        weights, originals = sites[0].weight, sites[0].originals
        per_vector: list[list[_Slice]] = []
        for group in _by_group(sites):
            per_vector.extend(_slices_of_vectors(group, weights, originals))
        table: list[list[int]] = []
        n_counters = 1 + sum(map(len, per_vector))
        n_rows = 0
        for slices in per_vector:
            for piece in slices:
                table.append(
                    [
                        n_rows,
                        piece.rows.shape[1],
                        piece.column_stride,
                        int(piece.aligned),
                        piece.vector,
                        piece.width,
                        len(slices),
                        n_counters,
                    ]
                )
                n_rows += piece.rows.shape[1]
            n_counters += -(-slices[0].width // BLOCK_D)
        device = weights.device
        return LaunchPlan(
            sites=tuple(sites),
            weights=weights,
            originals=originals,
            slices=torch.tensor(table, dtype=torch.int64).view(-1, len(FIELDS)).to(device),
            rows=torch.cat([piece.rows for slices in per_vector for piece in slices], 1).to(device),
            counters=torch.zeros(n_counters, dtype=torch.int32, device=device),
            strided=not all(row[FIELDS.index("aligned")] for row in table),
            n_blocks=max(-(-site.originals.shape[1] // BLOCK_D) for site in sites),
        )


@dataclass(frozen=True)
class _Slice:
    rows: Int[Tensor, "3 R"]
    column_stride: int
    aligned: bool
    vector: int
    width: int


def reachable(site: SiteRows, base: SiteRows) -> bool:
    size = site.weight.element_size()
    return (
        site.weight.dtype in KERNEL_DTYPES
        and site.originals.dtype == site.weight.dtype
        and site.originals.device == site.weight.device
        and site.originals.is_contiguous()
        and (site.weight.data_ptr() - base.weight.data_ptr()) % size == 0
        and (site.originals.data_ptr() - base.originals.data_ptr()) % size == 0
    )


def _by_group(sites: Iterable[SiteRows]) -> list[list[SiteRows]]:
    groups: dict[int, list[SiteRows]] = {}
    for site in sites:
        groups.setdefault(site.first_vector, []).append(site)
    return list(groups.values())


def _slices_of_vectors(
    sites: Sequence[SiteRows], weights: Tensor, originals: Tensor
) -> list[list[_Slice]]:
    """For each vector of a group its slices, at all the sites that share it."""
    width = sites[0].originals.shape[1]
    slices: list[list[_Slice]] = [[] for _ in range(sites[0].n_clusters)]
    for site in sites:
        size = site.weight.element_size()
        first = (site.weight.data_ptr() - weights.data_ptr()) // size
        first_original = (site.originals.data_ptr() - originals.data_ptr()) // size
        neurons, clusters = site.neurons.cpu(), site.clusters.cpu()
        positions = torch.arange(len(neurons))
        table = torch.stack(
            [
                first + neurons * site.weight.stride(0),
                first_original + positions * width,
                torch.full_like(positions, -1)
                if site.first_loading is None
                else site.first_loading + positions,
            ]
        )
        for cluster, own in enumerate(slices):
            rows = table[:, clusters == cluster]
            n_pieces = -(-rows.shape[1] // SLICE_ROWS)
            for piece in torch.tensor_split(rows, max(n_pieces, 1), dim=1) if n_pieces else ():
                own.append(
                    _Slice(
                        rows=piece,
                        column_stride=site.weight.stride(1),
                        aligned=_aligned(site, piece, weights, originals),
                        vector=site.first_vector + cluster * width,
                        width=width,
                    )
                )
    for cluster, own in enumerate(slices):
        if not own:
            vector = sites[0].first_vector + cluster * width
            own.append(_Slice(torch.empty(3, 0, dtype=torch.int64), 1, True, vector, width))
    return slices


def _aligned(site: SiteRows, rows: Int[Tensor, "3 R"], weights: Tensor, originals: Tensor) -> bool:
    step = 16 // site.weight.element_size()
    return (
        site.weight.stride(1) == 1
        and site.originals.shape[1] % step == 0
        and weights.data_ptr() % 16 == 0
        and originals.data_ptr() % 16 == 0
        and not bool((rows[:2] % step).any())
    )
