"""The thin gradients are autograd's through y = x (W0 + diag(s) M U)^T."""

from __future__ import annotations

import pytest
import torch

from nest_kernels.cluster_grad import cluster_gradients


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    ("t", "d", "f", "n", "k"),
    [(1, 1, 1, 1, 1), (7, 5, 11, 4, 2), (33, 17, 23, 23, 23), (64, 8, 40, 9, 3), (3, 4, 9, 5, 8)],
)
def test_equal_to_autograd(t: int, d: int, f: int, n: int, k: int, loaded: bool) -> None:
    draw = torch.Generator().manual_seed(t)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    inputs, weight, grad_output = randn(t, d), randn(f, d), randn(t, f)
    neurons = torch.randperm(f, generator=draw)[:n]
    clusters = torch.randint(k, (n,), generator=draw)
    vectors = randn(k, d).requires_grad_()
    loadings = randn(n).requires_grad_() if loaded else None
    delta = vectors[clusters] if loadings is None else loadings[:, None] * vectors[clusters]
    output = inputs @ weight.index_add(0, neurons, delta).T
    wanted = [vectors] if loadings is None else [vectors, loadings]
    expected = torch.autograd.grad(output, wanted, grad_output)
    found = cluster_gradients(
        grad_output,
        inputs,
        vectors.detach(),
        neurons,
        clusters,
        None if loadings is None else loadings.detach(),
    )
    # fp64 on both sides; only the order of the sums differs
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-12)
    if loaded:
        assert found[1] is not None
        torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-12)
    else:
        assert found[1] is None


def test_half_precision_gives_fp32_gradients_of_the_very_numbers() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 6, generator=draw).bfloat16()
    grad_output = torch.randn(50, 9, generator=draw).bfloat16()
    neurons, clusters = torch.tensor([0, 3, 8]), torch.tensor([1, 0, 1])
    found, _ = cluster_gradients(grad_output, inputs, torch.zeros(2, 6), neurons, clusters)
    wide = grad_output.double()
    summed = torch.stack([wide[:, 3], wide[:, 0] + wide[:, 8]], dim=1)
    assert found.dtype == torch.float32
    # products of bf16 numbers are exact in fp32; 50 of them are summed: 50 * 2**-24 relative
    torch.testing.assert_close(found.double(), summed.T @ inputs.double(), rtol=1e-5, atol=1e-5)
