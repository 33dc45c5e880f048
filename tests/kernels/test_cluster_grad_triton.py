"""The Triton gradients are the reference's; under the interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from projections import SHAPES, projection
from weights import DEVICES, DTYPES

from nest_kernels.cluster_grad import ClusterGradients, cluster_gradients, reference

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def check_close(found: torch.Tensor | None, expected: torch.Tensor | None, rounding: float) -> None:
    if found is None or expected is None:
        assert found is expected
        return
    assert found.shape == expected.shape
    # Each term is rounded by at most `rounding` of the largest; terms may cancel.
    largest = float(expected.abs().max())
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=rounding * largest)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("t", "d", "f", "sizes"), SHAPES)
def test_equal_to_the_reference(
    t: int,
    d: int,
    f: int,
    sizes: tuple[int, ...],
    strided: bool,
    loaded: bool,
    dtype: torch.dtype,
    device: str,
) -> None:
    given = projection(t, d, f, sizes, loaded=loaded, dtype=dtype, device=device, strided=strided)
    arguments = given.grad_output, given.inputs, given.vectors, given.members, given.loadings
    found: ClusterGradients = cluster_gradients(*arguments, backend="triton")
    expected = reference.cluster_gradients(*arguments)
    assert found.vectors.dtype == torch.float32
    assert found.summed.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    # bf16: `summed` and U are rounded to 8 bits once (2**-9 of each term); else sums in fp32
    rounding = 2**-7 if dtype == torch.bfloat16 else 2e-5
    check_close(found.summed, expected.summed, rounding)
    check_close(found.vectors, expected.vectors, rounding)
    check_close(found.loadings, expected.loadings, rounding)


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_sums_are_the_references_rounded_once(device: str) -> None:
    given = projection(130, 4, 9, (1, 1, 3), loaded=False, dtype=torch.bfloat16, device=device)
    arguments = given.grad_output, given.inputs, given.vectors, given.members
    found = cluster_gradients(*arguments, backend="triton")
    expected = reference.cluster_gradients(*arguments)
    # one and three terms of 8 bits: the sums are exact in fp32 unless their exponents lie far apart
    assert torch.equal(found.summed[:, :2], expected.summed[:, :2].bfloat16())
    torch.testing.assert_close(found.summed.float(), expected.summed, rtol=2**-8, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("t", "sizes"), [(0, (2, 1)), (5, (0, 0))])
def test_nothing_to_sum(t: int, sizes: tuple[int, ...], device: str) -> None:
    given = projection(t, 3, 4, sizes, loaded=True, dtype=torch.float32, device=device)
    found = cluster_gradients(
        given.grad_output,
        given.inputs,
        given.vectors,
        given.members,
        given.loadings,
        backend="triton",
    )
    assert not found.vectors.any() and found.vectors.shape == given.vectors.shape
    assert found.loadings is not None and not found.loadings.any()
    assert found.summed.shape == (t, len(sizes))


def test_fp64_takes_the_reference() -> None:
    given = projection(7, 5, 11, (3, 1), loaded=True, dtype=torch.float64)
    arguments = given.grad_output, given.inputs, given.vectors, given.members, given.loadings
    found = cluster_gradients(*arguments, backend="triton")
    assert found.vectors.dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(dtype: torch.dtype) -> None:
    given = projection(4099, 512, 3000, (900, 1, 0, 300), loaded=True, dtype=dtype, device="cuda")
    arguments = given.grad_output, given.inputs, given.vectors, given.members, given.loadings
    first, second = cluster_gradients(*arguments), cluster_gradients(*arguments)
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.summed, second.summed)
    assert first.loadings is not None and second.loadings is not None
    assert torch.equal(first.loadings, second.loadings)
