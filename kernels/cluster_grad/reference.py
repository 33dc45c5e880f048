"""Plain torch: gradients of a cluster update from a projection's inputs and output gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nest_kernels.cluster_grad.members import Members


class ClusterGradients(NamedTuple):
    """What a projection's backward pass gives an update.

    Attributes:
        vectors: dU, (K, D).
        loadings: ds, (N,); None where the form has none.
        summed: Scaled output gradients, summed over each cluster's neurons, (T, K): dU is its
            transpose times X, and its product with U is what the input's gradient gains.
    """

    vectors: Float[Tensor, "K D"]
    loadings: Float[Tensor, " N"] | None
    summed: Float[Tensor, "T K"]


@torch.no_grad()
def cluster_gradients(
    grad_output: Float[Tensor, "T F"],
    inputs: Float[Tensor, "T D"],
    vectors: Float[Tensor, "K D"],
    members: Members,
    loadings: Float[Tensor, " N"] | None = None,
) -> ClusterGradients:
    """Gradients of the vectors U and loadings s of y = x (W0 + diag(s) M U)^T, M the membership.

        dU = ((M diag(s))^T dY^T) X        ds_i = sum over tokens of dY[t, i] (X U^T)[t, c(i)]

    The largest temporary is T x N; nothing of the weight's size is formed.

    Args:
        grad_output: Gradient of the loss with respect to the projection's output (dY).
        inputs: What the projection was given (X), in the same dtype.
        vectors: One a cluster (U), fp32 or fp64.
        members: The selected columns of dY and their clusters.
        loadings: One scalar a neuron (s); None where the form has none.

    Returns:
        Gradients in fp32, in fp64 where an argument is.

    Source: arXiv 2602.16835, equation of the update; the thin form is the chain rule through it.
    """
    wide = torch.promote_types(inputs.dtype, vectors.dtype)
    chosen = grad_output.index_select(1, members.columns).to(wide)  # (T, N)
    membership = torch.zeros(
        len(members.columns), members.n_clusters, dtype=wide, device=chosen.device
    )
    scale = torch.ones_like(membership[:, :1]) if loadings is None else loadings[:, None].to(wide)
    membership.scatter_(1, members.clusters[:, None], scale)  # diag(s) M, (N, K)
    summed = chosen @ membership  # (T, K)
    tokens = inputs.to(wide)  # (T, D)
    grad_vectors = summed.T @ tokens
    if loadings is None:
        return ClusterGradients(grad_vectors, None, summed)
    projected = tokens @ vectors.to(wide).T  # (T, K)
    grad_loadings = (chosen * projected.index_select(1, members.clusters)).sum(dim=0)
    return ClusterGradients(grad_vectors, grad_loadings, summed)
