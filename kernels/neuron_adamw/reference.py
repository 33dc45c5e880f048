"""Plain torch: one AdamW step on packed cluster updates, and the rows that follow from an update."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


@torch.no_grad()
def adamw_step(
    parameters: Float[Tensor, " P"],
    gradient: Float[Tensor, " P"],
    exp_avg: Float[Tensor, " P"],
    exp_avg_sq: Float[Tensor, " P"],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    n_decayed: int,
) -> None:
    """One AdamW step, in place on `parameters`, `exp_avg` and `exp_avg_sq`.

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        parameters: All vectors, then all loadings, packed, fp32.
        gradient: Of the loss, packed the same way, fp32.
        exp_avg: First moment, fp32.
        exp_avg_sq: Second moment, fp32.
        step: Number of this step, from 1.
        lr: Learning rate.
        betas: Decay of the moments, each in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, on the first `n_decayed` parameters only.
        n_decayed: How many parameters decay: the vectors do, the loadings (which rest at one) do not.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", algorithm 2.
    """
    beta1, beta2 = betas
    parameters[:n_decayed].mul_(1.0 - lr * weight_decay)
    exp_avg.lerp_(gradient, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(eps)
    parameters.addcdiv_(exp_avg, denominator, value=-lr / (1.0 - beta1**step))


def updated_rows(
    rows: Float[Tensor, "N D"],
    vectors: Float[Tensor, "K D"],
    clusters: Int[Tensor, " N"],
    loadings: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "N D"]:
    """The rows that a model holds while it carries an update: cast(W0 + s U[c]).

    The sum is taken in fp32 (in fp64 for fp64 rows). Product and sum are separate operations, never
    one fused multiply-add, so that every machine gets the same bits.

    Args:
        rows: The original rows W0, in the weight's dtype.
        vectors: One vector a cluster (U), fp32.
        clusters: Cluster of each row, in [0, K).
        loadings: One scalar a row (s), fp32; None adds U[c] as it is.

    Returns:
        New rows in the dtype of `rows`; no gradient flows.
    """
    delta = vectors.detach()[clusters]  # (N, D)
    if loadings is not None:
        delta = delta * loadings.detach()[:, None]
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (rows.detach().to(wide) + delta.to(wide)).to(rows.dtype)
