"""Many tokens' activations as one number a neuron."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nest.activations.config import Pool


def pool_tokens(
    values: Float[Tensor, "B T F"],
    mask: Bool[Tensor, "B T"],
    pool: Pool,
    *,
    n_full: int | None = None,
) -> Float[Tensor, "B F"]:
    """One number a neuron and prompt, padding left out.

    Args:
        values: Activations at every token.
        mask: True at the prompt's own tokens; at least one a row.
        pool: `max` (the paper's), `mean`, or `last` (the last own token).
        n_full: `full_columns(mask)`, where it is known already.

    Returns:
        Pooled activations in fp32.

    Source: arXiv 2602.16835, section 3.2 (max over the prompt's tokens).
    """
    if pool == "max":
        # Padding stands on the right, so most columns are full; only the others need a masked copy.
        if n_full is None:
            n_full = full_columns(mask)
        if n_full == mask.shape[1]:
            return values.amax(dim=1).float()
        tail = values[:, n_full:].masked_fill(~mask[:, n_full:, None], float("-inf")).amax(dim=1)
        if n_full == 0:
            return tail.float()
        return torch.maximum(values[:, :n_full].amax(dim=1), tail).float()
    padded = not bool(mask.all())
    if pool == "mean":
        weights = mask.to(torch.float32)
        kept = values.float().masked_fill(~mask[:, :, None], 0.0) if padded else values.float()
        return kept.sum(dim=1) / weights.sum(dim=1, keepdim=True)
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last = positions.masked_fill(~mask, -1).amax(dim=1)  # (B,)
    return values[torch.arange(values.shape[0], device=values.device), last].float()


def full_columns(mask: Bool[Tensor, "B T"]) -> int:
    """How many of the first tokens are no padding in any row."""
    return int(mask.all(dim=0).long().cumprod(dim=0).sum())
