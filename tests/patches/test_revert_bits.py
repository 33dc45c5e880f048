"""Packed bits restore rows exactly, whatever the rounding lost."""

from __future__ import annotations

import tracemalloc
import zlib

import pytest
import torch

from nest.errors import PatchError
from nest.patches.revert_bits import delta_rows, pack_revert_bits, unpack_original_rows
from nest_kernels.neuron_adamw import updated_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _rows(dtype: torch.dtype, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    original = torch.randn(5, 33, generator=draw).to(dtype)
    original[0, :4] = torch.tensor([0.0, -0.0, 1e-30, -1e-7]).to(dtype)
    vectors = scale * torch.randn(2, 33, generator=draw)
    clusters, loadings = torch.tensor([0, 1, 1, 0, 1]), torch.randn(5, generator=draw)
    new = updated_rows(original, vectors, clusters, loadings)
    return original, new, delta_rows(vectors, clusters, loadings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 0.1, 1000.0])
def test_round_trip_is_exact(dtype: torch.dtype, scale: float) -> None:
    original, new, delta = _rows(dtype, scale)
    restored = unpack_original_rows(new, delta, pack_revert_bits(original, new, delta))
    assert restored.dtype == dtype
    assert torch.equal(restored.view(torch.uint8), original.view(torch.uint8))


def test_the_bits_are_much_smaller_than_the_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    original = torch.randn(64, 512, generator=draw).bfloat16()
    delta = 0.05 * torch.randn(64, 512, generator=draw)
    new = (original.float() + delta).bfloat16()
    packed = pack_revert_bits(original, new, delta)
    # Measured: 0.05 of the rows' bytes; a wrong prediction gives 0.54.
    assert len(packed) < 0.1 * 2 * original.numel()


def test_without_the_bits_rounding_loses_some() -> None:
    original, new, delta = _rows(torch.bfloat16, 0.1)
    assert not torch.equal((new.float() - delta).to(torch.bfloat16), original)


def test_delta_is_what_updated_rows_adds() -> None:
    vectors, clusters = torch.randn(2, 3), torch.tensor([1, 0, 1])
    zeros = torch.zeros(3, 3)
    for loadings in (None, torch.randn(3)):
        expected = updated_rows(zeros, vectors, clusters, loadings)
        assert torch.equal(delta_rows(vectors, clusters, loadings), expected)


def test_bombs_and_damage_are_refused() -> None:
    original, new, delta = _rows(torch.float32, 0.1)
    packed = pack_revert_bits(original, new, delta)
    bomb = zlib.compress(bytes(50_000_000))
    short = zlib.compress(b"short")
    for bad in (bomb, short, packed[:-3], packed + b"x", b"not zlib", b""):
        tracemalloc.start()
        with pytest.raises(PatchError, match="revert bits"):
            unpack_original_rows(new, delta, bad)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_000_000
