"""AdamW on cluster updates, and the rows that follow from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nest_kernels.backend import Backend, use_triton
from nest_kernels.neuron_adamw import reference
from nest_kernels.neuron_adamw.plan import LaunchPlan
from nest_kernels.neuron_adamw.reference import adamw_step, updated_rows
from nest_kernels.neuron_adamw.site_rows import SiteRows
from nest_kernels.neuron_adamw.table import SiteTable

__all__ = [
    "SiteRows",
    "SiteTable",
    "adamw_step",
    "neuron_adamw",
    "updated_rows",
    "write_updated_rows",
]


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
    backend: Backend = "auto",
) -> None:
    """One AdamW step, and every selected row with it, in place; see `reference.neuron_adamw`.

    On CUDA it is one Triton launch; pass a `SiteTable`, which keeps that launch's index tables from
    step to step. A model spread over devices, fp64 and vectors shared by weights of different dtypes
    take the reference, whatever `backend` says.

    Raises:
        ValueError: an unknown backend; Triton on CPU tensors outside its interpreter; vectors and
            loadings of the sites that do not tile the packed parameters.
    """
    packed = (parameters, gradient, exp_avg, exp_avg_sq)
    plans = _plans(sites, packed, backend)
    if plans is None:
        reference.neuron_adamw(
            sites,
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
        return
    from nest_kernels.neuron_adamw import triton as kernel

    kernel.neuron_adamw(
        plans,
        *packed,
        step,
        lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        n_decayed=n_decayed,
    )


@torch.no_grad()
def write_updated_rows(
    sites: Sequence[SiteRows], parameters: Float[Tensor, " P"], *, backend: Backend = "auto"
) -> None:
    """Put cast(W0 + s U[c]) into the selected rows; on CUDA one launch, as in `neuron_adamw`."""
    plans = _plans(sites, (parameters,), backend)
    if plans is None:
        reference.write_updated_rows(sites, parameters)
        return
    from nest_kernels.neuron_adamw import triton as kernel

    kernel.write_updated_rows(plans, parameters)


def takes_kernel(sites: Sequence[SiteRows], parameters: Float[Tensor, " P"]) -> bool:
    """Whether `write_updated_rows` is launches of the kernel, and not the reference."""
    return _plans(sites, (parameters,), "auto") is not None


def _plans(
    sites: Sequence[SiteRows], packed: tuple[Tensor, ...], backend: Backend
) -> tuple[LaunchPlan, ...] | None:
    """The launches to make; None where the reference is to run."""
    parameters = packed[0]
    if not use_triton(parameters, backend):
        return None
    table = sites if isinstance(sites, SiteTable) else SiteTable(sites)
    fits = all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in packed)
    if not fits or not table.plans or table.plans[0].weights.device != parameters.device:
        return None
    if table.n_parameters != parameters.numel():
        raise ValueError(
            f"the sites' vectors and loadings are {table.n_parameters} numbers, the packed parameters "
            f"{parameters.numel()}; every parameter must belong to a site"
        )
    return table.plans
