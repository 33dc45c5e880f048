"""Casts in kernels are torch's, for every bit pattern."""

from __future__ import annotations

import math

import pytest
import torch
from weights import DEVICES, DTYPES

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from nest_kernels.neuron_adamw.triton import one_minus_power  # noqa: E402 - triton may be absent
from nest_kernels.numerics import narrowed, widened  # noqa: E402


@triton.jit
def cast_kernel(source, target, n, WIDEN: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(source + at, mask=at < n)
    y = widened(x) if WIDEN else narrowed(x, target.dtype.element_ty)
    tl.store(target + at, y, mask=at < n)


@triton.jit
def power_kernel(t, target, log_beta, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(t + at, mask=at < n, other=1.0)
    tl.store(target + at, one_minus_power(log_beta, x), mask=at < n)


def check_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.0), expected.nan_to_num(0.0))
    assert torch.equal(found.signbit()[~found.isnan()], expected.signbit()[~found.isnan()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrowed_rounds_to_nearest_even(dtype: torch.dtype, device: str) -> None:
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 15,), generator=draw)
    # ties, and their neighbours, at every exponent
    ties = (torch.randint(-(2**15), 2**15, (1 << 14,), generator=draw) << 16) + 0x8000
    # NaNs that a carry would turn into infinity or zero
    odd = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF, 0x7F7FFFFF, 1, 0, -(2**31)])
    bits = torch.cat([odd, bits, ties, ties + 1])[: 1 << 16].to(torch.int32)
    source = bits.view(torch.float32)
    if dtype == torch.float16:  # numpy, under the interpreter, warns of what overflows
        source = source[source.abs() < 65504]
    target = torch.full_like(source, torch.nan, dtype=dtype, device=device)
    cast_kernel[(1,)](source.to(device), target, source.numel(), WIDEN=False, BLOCK=1 << 16)
    check_same_bits(target.cpu(), source.to(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widened_is_exact(dtype: torch.dtype, device: str) -> None:
    source = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    target = torch.full((1 << 16,), torch.nan, device=device)
    cast_kernel[(1,)](source.to(device), target, 1 << 16, WIDEN=True, BLOCK=1 << 16)
    check_same_bits(target.cpu(), source.float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999])
def test_one_minus_power_keeps_its_digits(beta: float, device: str) -> None:
    t = torch.cat([torch.arange(1.0, 5000.0), torch.tensor([1e4, 1e5, 1e6, 1e7])])
    target = torch.full_like(t, torch.nan, device=device)
    log_beta = math.log(beta) if beta else -200.0
    power_kernel[(1,)](t.to(device), target, log_beta, t.numel(), BLOCK=8192)
    # fp32's own rounding of log(beta) is 6e-8, of each operation too; GPUs' exp is good to 2**-22
    torch.testing.assert_close(target.cpu().double(), 1 - beta ** t.double(), rtol=1e-6, atol=0)
