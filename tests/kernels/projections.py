"""What a projection's backward pass has at hand, for the tests of `cluster_grad`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nest_kernels.cluster_grad import Members


@dataclass(frozen=True)
class Projection:
    grad_output: Tensor
    inputs: Tensor
    vectors: Tensor
    members: Members
    loadings: Tensor | None


def projection(
    t: int,
    d: int,
    f: int,
    sizes: tuple[int, ...],
    *,
    loaded: bool,
    dtype: torch.dtype,
    device: str = "cpu",
    strided: bool = False,
) -> Projection:
    """Random tensors; `strided` takes the output's gradient as a slice of a transposed tensor."""
    draw = torch.Generator().manual_seed(t + d + f)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grad_output = randn(f + 3, t).T[:, 2:-1] if strided else randn(t, f)
    clusters = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    clusters = clusters[torch.randperm(len(clusters), generator=draw)]
    columns = torch.randperm(f, generator=draw)[: len(clusters)]
    # .to keeps the strides
    return Projection(
        grad_output=grad_output.to(dtype).to(device),
        inputs=randn(t, d).to(dtype).to(device),
        vectors=randn(len(sizes), d).to(wide).to(device),
        members=Members.of(columns.to(device), clusters.to(device), len(sizes)),
        loadings=randn(len(clusters)).to(wide).to(device) if loaded else None,
    )


SHAPES = [
    (1, 1, 1, (1,)),
    (7, 5, 11, (3, 1)),
    (65, 17, 23, (1,) * 23),
    (64, 8, 60, (17, 0, 1, 33)),
    (200, 4, 40, (40,)),
    (3, 4, 9, (0, 0, 5)),
]
