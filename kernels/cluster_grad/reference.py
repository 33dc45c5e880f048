"""Plain torch: gradients of a cluster update from a projection's inputs and output gradients."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


@torch.no_grad()
def cluster_gradients(
    grad_output: Float[Tensor, "T F"],
    inputs: Float[Tensor, "T D"],
    vectors: Float[Tensor, "K D"],
    neurons: Int[Tensor, " N"],
    clusters: Int[Tensor, " N"],
    loadings: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, "K D"], Float[Tensor, " N"] | None]:
    """Gradients of the vectors U and loadings s of y = x (W0 + diag(s) M U)^T, M the membership.

        dU = ((M diag(s))^T dY^T) X        ds_i = sum over tokens of dY[t, i] (X U^T)[t, c(i)]

    The largest temporary is T x N; nothing of the weight's size is formed.

    Args:
        grad_output: Gradient of the loss with respect to the projection's output (dY).
        inputs: What the projection was given (X), in the same dtype.
        vectors: One a cluster (U), fp32.
        neurons: Columns of `grad_output` that are selected.
        clusters: Cluster of each, in [0, K).
        loadings: One scalar a neuron (s); None where the form has none.

    Returns:
        dU, and ds or None, both in the dtype of `vectors`.

    Source: arXiv 2602.16835, equation of the update; the thin form is the chain rule through it.
    """
    chosen = grad_output.index_select(1, neurons).to(vectors.dtype)  # (T, N)
    scaled = chosen if loadings is None else chosen * loadings
    summed = torch.zeros(len(chosen), len(vectors), dtype=vectors.dtype, device=chosen.device)
    summed.index_add_(1, clusters, scaled)  # (T, K)
    wide = inputs.to(vectors.dtype)  # (T, D)
    grad_vectors = summed.T @ wide
    if loadings is None:
        return grad_vectors, None
    projected = wide @ vectors.T  # (T, K)
    return grad_vectors, (chosen * projected.index_select(1, clusters)).sum(dim=0)
