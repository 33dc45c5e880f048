"""The reference's step is AdamW's, and rows are cast(W0 + s U[c])."""

from __future__ import annotations

import pytest
import torch
from weights import DTYPES, LAYOUTS, Spec, Weights

from nest_kernels.neuron_adamw import (
    adamw_step,
    neuron_adamw,
    updated_rows,
    write_updated_rows,
)


def oracle_steps(
    dtype: torch.dtype,
    n: int,
    n_decayed: int,
    n_steps: int,
    betas: tuple[float, float],
    weight_decay: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed parameters and step count after our steps, and the parameters after torch's."""
    draw = torch.Generator().manual_seed(n)
    packed = torch.randn(n, generator=draw, dtype=torch.float64).to(dtype)
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
        foreach=False,
    )
    exp_avg, exp_avg_sq = torch.zeros_like(packed), torch.zeros_like(packed)
    count, lr = torch.tensor(0.0), torch.tensor(0.0)
    for step in range(1, n_steps + 1):
        drawn = torch.randn(n, generator=draw, dtype=torch.float64) * 10.0 ** (step % 7 - 3)
        gradient = drawn.to(dtype)
        lr.fill_(0.03 / step)
        for group in oracle.param_groups:
            group["lr"] = float(lr)
        decayed.grad, resting.grad = gradient[:n_decayed].clone(), gradient[n_decayed:].clone()
        oracle.step()
        adamw_step(
            packed,
            gradient,
            exp_avg,
            exp_avg_sq,
            count,
            lr,
            betas=betas,
            eps=1e-6,
            weight_decay=weight_decay,
            n_decayed=n_decayed,
        )
    return packed, count, torch.cat([decayed.detach(), resting.detach()])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
@pytest.mark.parametrize(("n", "n_decayed"), [(1, 1), (37, 20), (37, 0), (37, 37)])
def test_steps_are_those_of_torchs_adamw(
    n: int, n_decayed: int, betas: tuple[float, float], weight_decay: float
) -> None:
    # in fp64, where the two orders of operations differ by far less than any mistake would
    found, count, expected = oracle_steps(torch.float64, n, n_decayed, 30, betas, weight_decay)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert float(count) == 30


def test_fp32_is_torchs_to_the_last_digits() -> None:
    found, _, expected = oracle_steps(torch.float32, 1001, 500, 10, (0.9, 0.999), 0.01)
    # ten steps, each with a rounding or two of fp32 (2 ** -24) on numbers of up to about 4
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_writes_the_rows_and_nothing_else(layout: str, dtype: torch.dtype) -> None:
    shared = [Spec(layout, 9, "shared"), Spec("rows", 9, "shared", loaded=False)]
    weights = Weights([*shared, Spec("rows", 4, "empty", sizes=(0,))], dtype)
    weights.poison()
    neuron_adamw(
        weights.sites,
        weights.parameters,
        torch.ones_like(weights.parameters),
        weights.exp_avg,
        weights.exp_avg_sq,
        weights.step,
        torch.tensor(0.1),
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.1,
        n_decayed=weights.n_vectors,
    )
    assert float(weights.step) == 1
    weights.check_rows()
    weights.poison()
    write_updated_rows(weights.sites, weights.parameters)
    weights.check_rows()


ALIKE = [Spec(layout, 9, group) for layout, group in zip(LAYOUTS, "aabcde", strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("specs", "at_once"),
    [
        (ALIKE, True),
        ([Spec("rows", 9, "a", sizes=(2, 0, 3)), Spec("expert", 9, "b", sizes=(1,))], True),
        ([Spec("rows", 9, "a", loaded=False), Spec("rows", 9, "b", loaded=False)], True),
        ([*ALIKE, Spec("rows", 9, "f", width=30)], False),
        ([*ALIKE, Spec("rows", 9, "f", loaded=False)], False),
    ],
)
def test_a_tables_rows_are_written_at_once_where_they_are_alike(
    specs: list[Spec], at_once: bool, dtype: torch.dtype
) -> None:
    weights = Weights(specs, dtype)
    assert (weights.sites.batches is not None) == at_once
    for sites in (weights.sites, tuple(weights.sites)):
        weights.poison()
        write_updated_rows(sites, weights.parameters, backend="reference")
        weights.check_rows()


@pytest.mark.parametrize("dtype", DTYPES)
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


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_zero_update_changes_no_bit(dtype: torch.dtype) -> None:
    rows = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = rows.to(dtype)
    clusters = torch.tensor([0, 0, 1, 1, 0, 1])
    for loadings in (None, torch.full((6,), 1.01)):
        assert torch.equal(updated_rows(rows, torch.zeros(2, 5), clusters, loadings), rows)


def test_no_gradient_flows() -> None:
    vectors = torch.nn.Parameter(torch.ones(1, 3))
    assert not updated_rows(torch.ones(2, 3), vectors, torch.zeros(2).long()).requires_grad
