"""The row arithmetic of a patch: what is added, and the bits that undo it exactly."""

from __future__ import annotations

import zlib

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nest.errors import PatchError


def delta_rows(
    vectors: Float[Tensor, "K D"],
    clusters: Int[Tensor, " N"],
    loadings: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "N D"]:
    """What an update adds to each row in fp32: U[c], or s U[c] with loadings."""
    delta = vectors.detach().float()[clusters]  # (N, D)
    return delta if loadings is None else delta * loadings.detach().float()[:, None]


def pack_revert_bits(
    original: Float[Tensor, "N D"], updated: Float[Tensor, "N D"], delta: Float[Tensor, "N D"]
) -> bytes:
    """The bits that turn a prediction of the original rows into the original rows.

    Rounding makes `updated - delta` miss the original by a few last bits. Those are kept, as
    original XOR prediction, grouped by significance so that the many zeros are neighbours, and
    compressed. Measured on unit-normal rows: 0.5 % of their size for updates of 0.001, 5 % for 0.05
    (bfloat16; 0.4 and 3 % in float32).
    """
    bits = _bytes_of(original) ^ _bytes_of(_predicted(updated, delta))
    planes = bits.view(-1, original.element_size()).T.contiguous()
    return zlib.compress(planes.numpy().tobytes(), level=6)


def unpack_original_rows(
    updated: Float[Tensor, "N D"], delta: Float[Tensor, "N D"], packed: bytes
) -> Float[Tensor, "N D"]:
    """The rows that `pack_revert_bits` was given as original, bit by bit.

    Raises:
        PatchError: `packed` is damaged, or does not hold exactly these rows' bits. Never more than
            the rows' own size is decompressed.
    """
    n_bytes = updated.numel() * updated.element_size()
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(packed, n_bytes + 1)
        # A stream that just fitted may still owe its checksum.
        raw += inflater.decompress(inflater.unconsumed_tail, 1) if len(raw) <= n_bytes else b""
    except zlib.error as fault:
        raise PatchError(f"the patch's revert bits are damaged ({fault}); fetch it again") from None
    if len(raw) != n_bytes or not inflater.eof or inflater.unused_data:
        raise PatchError(
            f"the patch's revert bits do not come to the {n_bytes} bytes of the rows they restore; "
            "fetch the patch again"
        )
    planes = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    bits = planes.view(updated.element_size(), -1).T.contiguous().flatten()
    original = bits ^ _bytes_of(_predicted(updated, delta))
    return original.view(updated.dtype).view(updated.shape)


def _predicted(updated: Tensor, delta: Tensor) -> Tensor:
    wide = torch.promote_types(updated.dtype, torch.float32)
    return (updated.to(wide) - delta.to(wide)).to(updated.dtype)


def _bytes_of(rows: Tensor) -> Tensor:
    return rows.contiguous().flatten().view(torch.uint8)
