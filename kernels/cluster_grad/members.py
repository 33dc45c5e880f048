"""Which columns of a projection's output belong to which cluster."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Members:
    """The selected neurons of one site, as columns of its module's output.

    Attributes:
        columns: Columns of the output, int64 (N,).
        clusters: Cluster of each, int64 (N,), in [0, K).
        order: Positions in `columns`, cluster by cluster, int64 (N,).
        starts: Where each cluster begins in `order`, int64 (K + 1,).
        n_clusters: K.
    """

    columns: Int[Tensor, " N"]
    clusters: Int[Tensor, " N"]
    order: Int[Tensor, " N"]
    starts: Int[Tensor, " K1"]
    n_clusters: int

    @staticmethod
    def of(columns: Int[Tensor, " N"], clusters: Int[Tensor, " N"], n_clusters: int) -> Members:
        """Sort the columns by cluster once, for all steps."""
        sizes = torch.bincount(clusters, minlength=n_clusters)
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        order = torch.argsort(clusters, stable=True)
        return Members(columns, clusters, order, starts, n_clusters)
