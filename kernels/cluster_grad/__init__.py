"""Gradients of a cluster update, without a dense weight gradient."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nest_kernels.backend import Backend, use_triton
from nest_kernels.cluster_grad import reference
from nest_kernels.cluster_grad.members import Members
from nest_kernels.cluster_grad.reference import ClusterGradients

__all__ = ["ClusterGradients", "Members", "cluster_gradients"]

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def cluster_gradients(
    grad_output: Float[Tensor, "T F"],
    inputs: Float[Tensor, "T D"],
    vectors: Float[Tensor, "K D"],
    members: Members,
    loadings: Float[Tensor, " N"] | None = None,
    *,
    backend: Backend = "auto",
) -> ClusterGradients:
    """dU, ds and the summed output gradients; see `reference.cluster_gradients`.

    On CUDA gather, scale and segment sum are one Triton launch, and `summed` is bf16 where the inputs
    are. fp64 and empty arguments take the reference, whatever `backend` says.

    Raises:
        ValueError: an unknown backend; Triton on CPU tensors outside its interpreter.
    """
    fp32 = vectors.dtype == torch.float32 and (loadings is None or loadings.dtype == torch.float32)
    half = inputs.dtype in _KERNEL_DTYPES and grad_output.dtype in _KERNEL_DTYPES
    some = inputs.shape[0] and members.n_clusters and members.columns.numel()
    if use_triton(grad_output, backend) and fp32 and half and some:
        from nest_kernels.cluster_grad import triton as kernel

        return kernel.cluster_gradients(grad_output, inputs, vectors, members, loadings)
    return reference.cluster_gradients(grad_output, inputs, vectors, members, loadings)
