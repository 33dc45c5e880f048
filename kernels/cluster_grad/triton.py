"""Gather, scale and sum the selected output gradients by cluster in one launch, then thin products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nest_kernels.backend import check_runnable
from nest_kernels.cluster_grad.members import Members
from nest_kernels.cluster_grad.reference import ClusterGradients
from nest_kernels.numerics import narrowed, widened

# A tile of 64 tokens x 16 neurons are 8 numbers a thread.
BLOCK_T = 64
BLOCK_N = 16
NUM_WARPS = 4


@triton.jit(
    do_not_specialize=["n_tokens", "n_clusters", "n_columns", "stride_token", "stride_column"]
)
def segment_sum_kernel(  # type: ignore[no-untyped-def]
    grad_output,
    columns,
    order,
    starts,
    loadings,
    projected,
    summed,
    partial,
    n_tokens,
    n_clusters,
    n_columns,
    stride_token,
    stride_column,
    LOADED: tl.constexpr,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
):
    """One block of tokens of one cluster.

    summed[t, k] = sum over the cluster's neurons of s dY[t, column]. LOADED: also the block's part of
    ds, partial[block, i] = sum over its tokens of dY[t, column] projected[t, k].
    """
    cluster = tl.program_id(0) % n_clusters
    block = tl.program_id(0) // n_clusters
    token = (block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    inside = token < n_tokens
    first = tl.load(starts + cluster)
    last = tl.load(starts + cluster + 1)
    if LOADED:
        through = tl.load(projected + token * n_clusters + cluster, mask=inside, other=0.0)
    total = tl.zeros((TOKENS,), dtype=tl.float32)
    start = first
    # No `range`: with numpy 2.4 the interpreter of triton 3.6 and older takes no tensor there.
    while start < last:
        at = start + tl.arange(0, NEURONS)
        held = at < last
        position = tl.load(order + at, mask=held, other=0)
        column = tl.load(columns + position, mask=held, other=0)
        grads = widened(
            tl.load(
                grad_output + (token[:, None] * stride_token + column[None, :] * stride_column),
                mask=inside[:, None] & held[None, :],
                other=0.0,
            )
        )
        if LOADED:
            # In this order: with ds first, registers run short on sm_80 under triton 3.7, and spill.
            scale = tl.load(loadings + position, mask=held, other=0.0)
            total += tl.sum(grads * scale[None, :], axis=1)
            own = tl.sum(grads * through[:, None], axis=0)
            tl.store(partial + block.to(tl.int64) * n_columns + position, own, mask=held)
        else:
            total += tl.sum(grads, axis=1)
        start += NEURONS
    tl.store(
        summed + token * n_clusters + cluster,
        narrowed(total, summed.dtype.element_ty),
        mask=inside,
    )


def cluster_gradients(
    grad_output: Tensor,
    inputs: Tensor,
    vectors: Tensor,
    members: Members,
    loadings: Tensor | None = None,
) -> ClusterGradients:
    """As `reference.cluster_gradients`; `summed` is bf16 where the inputs are.

    Both products with `summed` then run on tensor cores, and the inputs (T x D) are not copied to
    fp32. It is rounded once, after the sum in fp32: what autograd does to every gradient of a bf16
    activation. fp16 has not the range for a sum of scaled gradients, and keeps fp32.
    """
    check_runnable(segment_sum_kernel, grad_output)
    n_tokens, n_columns, n_clusters = len(inputs), len(members.columns), members.n_clusters
    thin = torch.bfloat16 if inputs.dtype == torch.bfloat16 else torch.float32
    summed = inputs.new_empty(n_tokens, n_clusters, dtype=thin)
    n_blocks = triton.cdiv(n_tokens, BLOCK_T)
    projected, partial = summed, summed  # read and written by none without loadings
    if loadings is not None:
        projected = thin_product(inputs, vectors.to(thin).T)
        partial = inputs.new_empty(n_blocks, n_columns, dtype=torch.float32)
    with torch.cuda.device_of(grad_output):  # a launch goes to the current device
        segment_sum_kernel[(n_blocks * n_clusters,)](
            grad_output,
            members.columns,
            members.order,
            members.starts,
            members.order if loadings is None else loadings,
            projected,
            summed,
            partial,
            n_tokens,
            n_clusters,
            n_columns,
            *grad_output.stride(),
            LOADED=loadings is not None,
            TOKENS=BLOCK_T,
            NEURONS=BLOCK_N,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return ClusterGradients(
        thin_product(summed.T, inputs),
        None if loadings is None else partial.sum(dim=0),
        summed,
    )


def thin_product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product in fp32; of two bf16 matrices on a GPU without a copy of either in fp32."""
    if left.is_cuda and left.dtype == right.dtype == torch.bfloat16:
        if hasattr(torch.ops.aten.mm, "dtype"):  # torch 2.8
            product: Tensor = torch.mm(left, right, out_dtype=torch.float32)  # type: ignore[call-overload, unused-ignore]
            return product
        return (left @ right).float()
    return left.float() @ right.float()
