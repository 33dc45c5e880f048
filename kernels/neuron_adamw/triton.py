"""One launch for the whole model: Adam on vectors and loadings, and the rows that follow.

A program owns `BLOCK_D` numbers of one slice of rows (see `plan`). From the old state it computes the
block of the new vector and the slice's new loadings, and writes that tile of the rows. Several programs
read the same old state: of a vector's block those of all its slices, of a loading those of all blocks.
None may overwrite what another has yet to read, so each counts itself out, and the last one out stores.
What it stores every one of them has computed alike: the result does not depend on which one was last.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nest_kernels.backend import check_runnable
from nest_kernels.neuron_adamw.plan import BLOCK_D, FIELDS, SLICE_ROWS, LaunchPlan
from nest_kernels.numerics import narrowed, widened

NUM_WARPS = 4

FIRST_ROW = tl.constexpr(FIELDS.index("first_row"))
N_ROWS = tl.constexpr(FIELDS.index("n_rows"))
COLUMN_STRIDE = tl.constexpr(FIELDS.index("column_stride"))
ALIGNED_ROWS = tl.constexpr(FIELDS.index("aligned"))
VECTOR = tl.constexpr(FIELDS.index("vector"))
WIDTH = tl.constexpr(FIELDS.index("width"))
N_SIBLINGS = tl.constexpr(FIELDS.index("n_siblings"))
BLOCK_COUNTER = tl.constexpr(FIELDS.index("block_counter"))
N_FIELDS = tl.constexpr(len(FIELDS))


@triton.jit
def last_one_out(counter, expected):  # type: ignore[no-untyped-def]
    """Whether this is the last of `expected` programs to come here; it leaves the counter at zero.

    Whatever the others read before they came, they have read.
    """
    tl.debug_barrier()  # all warps of this program, not only the one that counts
    last = tl.atomic_add(counter, 1, sem="acq_rel") == expected - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def one_minus_power(log_beta, t):  # type: ignore[no-untyped-def]
    """1 - beta^t to the last digits of fp32; 1 - exp(...) alone loses most of them at small t."""
    x = t * log_beta
    near = tl.maximum(x, -0.5)
    series = 1.0 + near / 9.0
    for i in tl.static_range(7):
        series = 1.0 + near / (8.0 - i) * series
    return tl.where(x > -0.5, -near * series, 1.0 - tl.exp(x))


@triton.jit
def adamw_update(  # type: ignore[no-untyped-def]
    p, g, m, v, decay, rate, root, beta1, rest1, beta2, rest2, eps
):
    """New parameter and moments."""
    m = m * beta1 + g * rest1
    v = v * beta2 + g * g * rest2
    p = p * decay - tl.div_rn(m * rate, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    return p, m, v


@triton.jit
def write_tile(  # type: ignore[no-untyped-def]
    u,
    s,
    columns,
    held,
    entry,
    at,
    n_table_rows,
    weights,
    originals,
    ALIGNED: tl.constexpr,
):
    """W[row] = cast(W0[row] + s u) for one block of columns of the slice's rows."""
    per_access: tl.constexpr = 128 // weights.dtype.element_ty.primitive_bitwidth
    width = tl.load(entry + WIDTH)
    row = tl.load(at, mask=held, other=0)
    original_row = tl.load(at + n_table_rows, mask=held, other=0)
    if ALIGNED:
        width = tl.multiple_of(width, per_access)
        row = tl.multiple_of(row, per_access)
        original_row = tl.multiple_of(original_row, per_access)
        steps = columns
    else:
        steps = columns * tl.load(entry + COLUMN_STRIDE)
    mask = held[:, None] & (columns < width)[None, :]
    original = tl.load(originals + (original_row[:, None] + columns[None, :]), mask=mask, other=0.0)
    # Product and sum stay separate (no fused multiply-add): the bits are those of `updated_rows`.
    # Launches ask for that, and yet ptxas 12.9, which triton 3.6 takes for Blackwell, fuses packed
    # pairs of them. It cannot with a choice in between; what is masked is not stored.
    product = tl.where(mask, s[:, None] * u[None, :], 0.0)
    moved = narrowed(widened(original) + product, weights.dtype.element_ty)
    tl.store(weights + (row[:, None] + steps[None, :]), moved, mask=mask)


@triton.jit(do_not_specialize=["n_slices", "n_blocks", "n_table_rows", "n_decayed"])
def neuron_adamw_kernel(  # type: ignore[no-untyped-def]
    parameters,
    gradient,
    exp_avg,
    exp_avg_sq,
    step,
    lr,
    weights,
    originals,
    slices,
    rows,
    counters,
    n_slices,
    n_blocks,
    n_table_rows,
    n_decayed,
    weight_decay,
    beta1,
    rest1,
    log_beta1,
    beta2,
    rest2,
    log_beta2,
    eps,
    ADAM: tl.constexpr,
    ADVANCE: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
):
    """ADAM: take the step; else only write the rows. ADVANCE: count the step, too.

    STRIDED: some slices are not aligned. Their copy of the tile costs registers (151 instead of 96 a
    thread for bf16 on sm_90), so where there are none it is left out.
    """
    slice_idx = tl.program_id(0) // n_blocks
    block = tl.program_id(0) % n_blocks
    entry = slices + slice_idx * N_FIELDS
    width = tl.load(entry + WIDTH)
    if block * BLOCK >= width:  # the widest vector decides the grid
        return
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    own = tl.load(entry + VECTOR) + columns  # int64
    local = tl.arange(0, SLICE)
    held = local < tl.load(entry + N_ROWS)
    at = rows + tl.load(entry + FIRST_ROW) + local
    loading = tl.load(at + 2 * n_table_rows, mask=held, other=-1)
    loaded = loading >= 0

    if ADAM:
        t = tl.load(step) + 1.0
        speed = tl.load(lr)
        rate = tl.div_rn(speed, one_minus_power(log_beta1, t))
        root = tl.sqrt_rn(one_minus_power(log_beta2, t))
        decay = 1.0 - speed * weight_decay
        u, u_m, u_v = adamw_update(
            tl.load(parameters + own, mask=inside, other=0.0),
            tl.load(gradient + own, mask=inside, other=0.0),
            tl.load(exp_avg + own, mask=inside, other=0.0),
            tl.load(exp_avg_sq + own, mask=inside, other=1.0),
            tl.where(own < n_decayed, decay, 1.0),
            rate,
            root,
            beta1,
            rest1,
            beta2,
            rest2,
            eps,
        )
        s, s_m, s_v = adamw_update(
            tl.load(parameters + loading, mask=loaded, other=0.0),
            tl.load(gradient + loading, mask=loaded, other=0.0),
            tl.load(exp_avg + loading, mask=loaded, other=0.0),
            tl.load(exp_avg_sq + loading, mask=loaded, other=1.0),
            tl.where(loading < n_decayed, decay, 1.0),
            rate,
            root,
            beta1,
            rest1,
            beta2,
            rest2,
            eps,
        )
    else:
        u = tl.load(parameters + own, mask=inside, other=0.0)
        s = tl.load(parameters + loading, mask=loaded, other=1.0)

    scale = tl.where(loaded, s, 1.0)  # without loadings: exactly u
    # What the compiler is told of alignment must hold on every path to it: two copies of the tile.
    if not STRIDED or tl.load(entry + ALIGNED_ROWS) == 1:
        write_tile(
            u, scale, columns, held, entry, at, n_table_rows, weights, originals, ALIGNED=True
        )
    else:
        write_tile(
            u, scale, columns, held, entry, at, n_table_rows, weights, originals, ALIGNED=False
        )

    if ADAM:
        n_siblings = tl.load(entry + N_SIBLINGS)
        stores = n_siblings == 1
        if n_siblings > 1:
            stores = last_one_out(counters + tl.load(entry + BLOCK_COUNTER) + block, n_siblings)
        if stores:
            tl.store(parameters + own, u, mask=inside)
            tl.store(exp_avg + own, u_m, mask=inside)
            tl.store(exp_avg_sq + own, u_v, mask=inside)
        if last_one_out(counters + 1 + slice_idx, tl.cdiv(width, BLOCK)):
            tl.store(parameters + loading, s, mask=loaded)
            tl.store(exp_avg + loading, s_m, mask=loaded)
            tl.store(exp_avg_sq + loading, s_v, mask=loaded)
            if ADVANCE:
                finished = last_one_out(counters, n_slices)  # every program has read the step
                if finished:  # and no mask: triton 3.2's interpreter ignores one on a scalar
                    tl.store(step, t)


def neuron_adamw(
    plans: tuple[LaunchPlan, ...],
    parameters: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    n_decayed: int,
) -> None:
    """One step; see `reference.neuron_adamw`. One launch for each plan, nothing read by the host."""
    for plan in plans:
        _launch(
            plan,
            parameters,
            (gradient, exp_avg, exp_avg_sq, step, lr),
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            n_decayed=n_decayed,
            adam=True,
            advance=plan is plans[-1],
        )


def write_updated_rows(plans: tuple[LaunchPlan, ...], parameters: Tensor) -> None:
    """Put cast(W0 + s U[c]) into the selected rows."""
    for plan in plans:
        _launch(
            plan,
            parameters,
            (parameters,) * 5,  # read by none
            betas=(0.0, 0.0),
            eps=0.0,
            weight_decay=0.0,
            n_decayed=0,
            adam=False,
            advance=False,
        )


def _launch(
    plan: LaunchPlan,
    parameters: Tensor,
    state: tuple[Tensor, ...],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    n_decayed: int,
    adam: bool,
    advance: bool,
) -> None:
    check_runnable(neuron_adamw_kernel, parameters)
    with torch.cuda.device_of(parameters):  # a launch goes to the current device
        neuron_adamw_kernel[(plan.n_programs,)](
            parameters,
            *state,
            plan.weights,
            plan.originals,
            plan.slices,
            plan.rows,
            plan.counters,
            len(plan.slices),
            plan.n_blocks,
            plan.rows.shape[1],
            n_decayed,
            float(weight_decay),
            *_decay(betas[0]),
            *_decay(betas[1]),
            float(eps),
            ADAM=adam,
            ADVANCE=advance,
            STRIDED=plan.strided,
            BLOCK=BLOCK_D,
            SLICE=SLICE_ROWS,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


def _decay(beta: float) -> tuple[float, float, float]:
    """Beta, the rest to one, and its logarithm; e^-200 is zero in fp32."""
    return float(beta), 1.0 - beta, math.log(beta) if beta > 0.0 else -200.0
