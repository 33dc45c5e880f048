"""Plain torch: one AdamW step on packed cluster updates, and the rows that follow from an update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.optim.adamw import adamw

from nest_kernels.neuron_adamw.site_rows import SiteRows
from nest_kernels.neuron_adamw.table import SiteTable


@torch.no_grad()
def neuron_adamw(
    sites: Sequence[SiteRows],
    parameters: Float[Tensor, " P"],
    gradient: Float[Tensor, " P"],
    exp_avg: Float[Tensor, " P"],
    exp_avg_sq: Float[Tensor, " P"],
    step: Float[Tensor, ""],
    lr: Float[Tensor, ""],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    n_decayed: int,
) -> None:
    """One AdamW step, and every selected row of the model with it; all in place.

        t = step + 1
        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
        W[row] = cast(W0[row] + s U[cluster])

    Args:
        sites: The rows; their weights are written.
        parameters: All vectors, then all loadings, packed, fp32.
        gradient: Of the loss, packed the same way, fp32; only read.
        exp_avg: First moment, fp32.
        exp_avg_sq: Second moment, fp32.
        step: Steps done before this one, fp32 on the parameters' device; one more afterwards.
        lr: Learning rate, fp32 on the parameters' device.
        betas: Decay of the moments, each in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, on the first `n_decayed` parameters only.
        n_decayed: How many parameters decay: the vectors do, the loadings do not.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", algorithm 2.
    """
    adamw_step(
        parameters,
        gradient,
        exp_avg,
        exp_avg_sq,
        step,
        lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        n_decayed=n_decayed,
    )
    write_updated_rows(sites, parameters)


@torch.no_grad()
def adamw_step(
    parameters: Float[Tensor, " P"],
    gradient: Float[Tensor, " P"],
    exp_avg: Float[Tensor, " P"],
    exp_avg_sq: Float[Tensor, " P"],
    step: Float[Tensor, ""],
    lr: Float[Tensor, ""],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    n_decayed: int,
) -> None:
    """`neuron_adamw` without the rows: torch's own AdamW on the packed tensors."""
    n = parameters.numel()
    # Vectors and loadings differ in their decay only; without any they are one tensor.
    bounds = [(0, n_decayed), (n_decayed, n)] if weight_decay and 0 < n_decayed < n else [(0, n)]
    steps = [step, step.clone()][: len(bounds)]
    for (first, last), own_step in zip(bounds, steps, strict=True):
        adamw(
            [parameters[first:last]],
            [gradient[first:last]],
            [exp_avg[first:last]],
            [exp_avg_sq[first:last]],
            [],
            [own_step],
            fused=parameters.device.type in ("cpu", "cuda"),
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=weight_decay if first < n_decayed else 0.0,
            eps=eps,
            maximize=False,
        )


@torch.no_grad()
def write_updated_rows(sites: Sequence[SiteRows], parameters: Float[Tensor, " P"]) -> None:
    """Put cast(W0 + s U[c]) into the selected rows; a `SiteTable`'s all at once."""
    batches = sites.batches if isinstance(sites, SiteTable) and sites else None
    if batches is None:
        for site in sites:
            _write_site(site, parameters)
        return
    for batch in batches:
        width = batch.originals.shape[1]
        matrix = parameters[: parameters.numel() // width * width].view(-1, width)
        loadings = None if batch.loadings is None else parameters.index_select(0, batch.loadings)
        rows = updated_rows(batch.originals, matrix, batch.vectors, loadings)
        for site, own in zip(batch.sites, rows.split(batch.sizes), strict=True):
            site.weight.index_copy_(0, site.neurons, own)


def _write_site(site: SiteRows, parameters: Float[Tensor, " P"]) -> None:
    vectors, loadings = site.vectors(parameters), site.loadings(parameters)
    home = site.weight.device
    if parameters.device != home:  # a model spread over devices
        vectors = vectors.to(home)
        loadings = None if loadings is None else loadings.to(home)
    rows = updated_rows(site.originals, vectors, site.clusters.to(home), loadings)
    site.weight.index_copy_(0, site.neurons, rows)


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
    delta = vectors.detach().index_select(0, clusters)  # (N, D), a copy
    if loadings is not None:
        delta.mul_(loadings.detach()[:, None])
    wide = torch.promote_types(rows.dtype, delta.dtype)
    return delta.to(wide).add_(rows.detach()).to(rows.dtype)
