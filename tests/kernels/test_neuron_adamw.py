"""One optimizer step is AdamW's, and rows are cast(W0 + s U[c])."""

from __future__ import annotations

import pytest
import torch

from nest_kernels.neuron_adamw import adamw_step, updated_rows


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
@pytest.mark.parametrize(("n", "n_decayed"), [(1, 1), (37, 20), (37, 0), (37, 37)])
def test_steps_are_those_of_torchs_adamw(
    n: int, n_decayed: int, betas: tuple[float, float], weight_decay: float
) -> None:
    draw = torch.Generator().manual_seed(n)
    # in fp64, where the two orders of operations differ by far less than any mistake would
    packed = torch.randn(n, generator=draw, dtype=torch.float64)
    decayed = torch.nn.Parameter(packed[:n_decayed].clone())
    resting = torch.nn.Parameter(packed[n_decayed:].clone())
    oracle = torch.optim.AdamW(
        [
            {"params": [decayed], "weight_decay": weight_decay},
            {"params": [resting], "weight_decay": 0.0},
        ],
        lr=0.03,
        betas=betas,
        eps=1e-6,
    )
    exp_avg, exp_avg_sq = torch.zeros_like(packed), torch.zeros_like(packed)
    for step in range(1, 31):
        gradient = torch.randn(n, generator=draw, dtype=torch.float64) * 10.0 ** (step % 7 - 3)
        rate = 0.03 / step
        for group in oracle.param_groups:
            group["lr"] = rate
        decayed.grad, resting.grad = gradient[:n_decayed].clone(), gradient[n_decayed:].clone()
        oracle.step()
        adamw_step(
            packed,
            gradient,
            exp_avg,
            exp_avg_sq,
            step=step,
            lr=rate,
            betas=betas,
            eps=1e-6,
            weight_decay=weight_decay,
            n_decayed=n_decayed,
        )
        expected = torch.cat([decayed.detach(), resting.detach()])
        torch.testing.assert_close(packed, expected, rtol=1e-12, atol=1e-14)


def test_fp32_is_torchs_to_the_last_digits() -> None:
    draw = torch.Generator().manual_seed(0)
    packed = torch.randn(1001, generator=draw)
    oracle_parameter = torch.nn.Parameter(packed.clone())
    oracle = torch.optim.AdamW([oracle_parameter], lr=1e-2, weight_decay=0.01, foreach=False)
    exp_avg, exp_avg_sq = torch.zeros_like(packed), torch.zeros_like(packed)
    for step in range(1, 11):
        gradient = torch.randn(1001, generator=draw)
        oracle_parameter.grad = gradient.clone()
        oracle.step()
        adamw_step(
            packed,
            gradient,
            exp_avg,
            exp_avg_sq,
            step=step,
            lr=1e-2,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.01,
            n_decayed=1001,
        )
    # ten steps, each with a rounding or two of fp32 (2 ** -24) on numbers of up to about 4
    torch.testing.assert_close(packed, oracle_parameter.detach(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (5, 3, 2), (17, 33, 4)])
def test_rows_are_cast_sums(n: int, d: int, k: int, loaded: bool, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(n)
    rows = torch.randn(n, d, generator=draw).to(dtype)
    vectors = torch.randn(k, d, generator=draw)
    clusters = torch.randint(k, (n,), generator=draw)
    loadings = torch.randn(n, generator=draw) if loaded else None
    before = rows.clone(), vectors.clone()
    new = updated_rows(rows, vectors, clusters, loadings)
    assert new.dtype == dtype
    for i in range(n):
        delta = vectors[clusters[i]]
        delta = delta if loadings is None else delta * loadings[i]
        assert torch.equal(new[i], (rows[i].float() + delta).to(dtype))
    assert torch.equal(rows, before[0]) and torch.equal(vectors, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_zero_update_changes_no_bit(dtype: torch.dtype) -> None:
    rows = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = rows.to(dtype)
    clusters = torch.tensor([0, 0, 1, 1, 0, 1])
    for loadings in (None, torch.full((6,), 1.01)):
        assert torch.equal(updated_rows(rows, torch.zeros(2, 5), clusters, loadings), rows)


def test_no_gradient_flows() -> None:
    vectors = torch.nn.Parameter(torch.ones(1, 3))
    assert not updated_rows(torch.ones(2, 3), vectors, torch.zeros(2).long()).requires_grad
