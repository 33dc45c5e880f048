"""Casts that the kernels share, the same bits on every GPU and under the interpreter.

Imports triton: only the modules that hold kernels import this one.
"""

from __future__ import annotations

import triton
import triton.language as tl


# bf16 is cast by integer operations: triton's interpreter truncates fp32 to bf16 (and gets subnormal
# numbers wrong), and what the tests see is to be what a GPU runs. A handful of integer operations an
# element stay far below what these kernels wait for memory.
@triton.jit
def widened(x):  # type: ignore[no-untyped-def]
    """x in fp32, exactly."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        wide = bits.to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def narrowed(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Fp32 x in another dtype, rounded to nearest, ties to even."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)  # the carry must not turn a NaN into infinity
        narrow = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = x.to(dtype)
    return narrow
