"""The thin gradients are autograd's through y = x (W0 + diag(s) M U)^T."""

from __future__ import annotations

import pytest
import torch
from projections import SHAPES, projection

from nest_kernels.cluster_grad import Members, cluster_gradients


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("t", "d", "f", "sizes"), SHAPES)
def test_equal_to_autograd(
    t: int, d: int, f: int, sizes: tuple[int, ...], strided: bool, loaded: bool
) -> None:
    given = projection(t, d, f, sizes, loaded=loaded, dtype=torch.float64, strided=strided)
    vectors = given.vectors.clone().requires_grad_()
    loadings = None if given.loadings is None else given.loadings.clone().requires_grad_()
    inputs = given.inputs.clone().requires_grad_()
    weight = torch.zeros(f, d, dtype=torch.float64)
    delta = vectors[given.members.clusters]
    delta = delta if loadings is None else loadings[:, None] * delta
    output = inputs @ weight.index_add(0, given.members.columns, delta).T
    wanted = [inputs, vectors] if loadings is None else [inputs, vectors, loadings]
    expected = torch.autograd.grad(output, wanted, given.grad_output)
    found = cluster_gradients(
        given.grad_output, given.inputs, given.vectors, given.members, given.loadings
    )
    # fp64 on both sides; only the order of the sums differs
    torch.testing.assert_close(found.summed @ given.vectors, expected[0], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(found.vectors, expected[1], rtol=1e-10, atol=1e-11)
    if loaded:
        assert found.loadings is not None
        torch.testing.assert_close(found.loadings, expected[2], rtol=1e-10, atol=1e-11)
    else:
        assert found.loadings is None


def test_half_precision_gives_fp32_gradients_of_the_very_numbers() -> None:
    given = projection(50, 6, 9, (1, 2), loaded=False, dtype=torch.bfloat16)
    exact = projection(50, 6, 9, (1, 2), loaded=False, dtype=torch.bfloat16)
    found = cluster_gradients(given.grad_output, given.inputs, given.vectors, given.members)
    expected = cluster_gradients(
        exact.grad_output.double(), exact.inputs.double(), exact.vectors.double(), exact.members
    )
    assert found.vectors.dtype == found.summed.dtype == torch.float32
    # products of bf16 numbers are exact in fp32; 50 of them are summed: 50 * 2**-24 relative
    torch.testing.assert_close(found.vectors.double(), expected.vectors, rtol=1e-5, atol=1e-5)


def test_members_are_sorted_by_cluster() -> None:
    members = Members.of(torch.tensor([7, 2, 9, 4]), torch.tensor([2, 0, 2, 0]), 4)
    assert members.order.tolist() == [1, 3, 0, 2]
    assert members.starts.tolist() == [0, 2, 2, 4, 4]
