"""The Triton step is the reference's; under the interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from weights import DEVICES, DTYPES, LAYOUTS, Spec, Weights

from nest_kernels.neuron_adamw import SiteRows, SiteTable, neuron_adamw, write_updated_rows
from nest_kernels.neuron_adamw.plan import BLOCK_D, FIELDS, SLICE_ROWS

pytest.importorskip("triton")

ALL_LAYOUTS = [
    # The widest decides the grid: others have blocks of nothing.
    Spec("rows", 30, "wide", width=264, sizes=(17, 1, 0)),
    *[Spec(layout, 11, layout, sizes=(3, 0, 1, 2)) for layout in LAYOUTS],
    Spec("fused", 9, "no loadings", loaded=False),
    # Two sites share their vectors; no row of either belongs to the last.
    Spec("rows", 9, "shared", width=16, sizes=(4, 1, 0)),
    Spec("transposed", 9, "shared", width=16, sizes=(0, 2, 0)),
    Spec("rows", 9, "empty", sizes=(0, 0)),
    Spec("rows", 1, "single", width=1, sizes=(1,)),
]
SMALL = [Spec("rows", 5, "a", width=3, sizes=(2, 1))]


def in_bf16(site: SiteRows) -> SiteRows:
    return replace(site, weight=site.weight.bfloat16(), originals=site.originals.bfloat16())


def check_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    # One rounding of fp32 is 6e-8, and torch's AdamW takes the same few operations in another order.
    # Terms as large as the largest number may cancel in the smallest.
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=5e-7 * max(largest, 1.0))


def gradients(weights: Weights, n_steps: int, seed: int = 1) -> Iterator[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    for step in range(n_steps):
        drawn = torch.randn(weights.parameters.numel(), generator=draw) * 10.0 ** (step % 5 - 2)
        yield drawn.to(weights.parameters.device)


def run(
    weights: Weights,
    backend: str,
    n_steps: int = 3,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.1,
    n_decayed: int | None = None,
) -> Iterator[None]:
    lr = torch.zeros_like(weights.step)
    for i, gradient in enumerate(gradients(weights, n_steps)):
        lr.fill_(0.03 / (i + 1))
        weights.poison()
        before = gradient.clone()
        neuron_adamw(
            weights.sites,
            weights.parameters,
            gradient,
            weights.exp_avg,
            weights.exp_avg_sq,
            weights.step,
            lr,
            betas=betas,
            eps=1e-6,
            weight_decay=weight_decay,
            n_decayed=weights.n_vectors if n_decayed is None else n_decayed,
            backend=backend,  # type: ignore[arg-type]
        )
        assert torch.equal(gradient, before)
        yield


def check_equal(specs: list[Spec], dtype: torch.dtype, device: str, **settings: object) -> None:
    ours, theirs = Weights(specs, dtype, device), Weights(specs, dtype, device)
    assert ours.sites.plans
    both = zip(
        run(ours, "triton", **settings),  # type: ignore[arg-type]
        run(theirs, "reference", **settings),  # type: ignore[arg-type]
        strict=True,
    )
    for i, _ in enumerate(both):
        for found, expected in zip(ours.state, theirs.state, strict=True):
            check_close(found, expected)
        assert float(ours.step) == i + 1
        ours.check_rows()
        ours.check_counters()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout(dtype: torch.dtype, device: str) -> None:
    check_equal(ALL_LAYOUTS, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_cluster_of_many_slices_and_blocks(device: str) -> None:
    specs = [
        Spec("rows", 60, "a", width=520, sizes=(35, 16)),
        Spec("transposed", 20, "a", width=520, sizes=(2, 0), loaded=False),
    ]
    check_equal(specs, torch.bfloat16, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
@pytest.mark.parametrize("n_decayed", [0, 4, None])
def test_settings(
    n_decayed: int | None, betas: tuple[float, float], weight_decay: float, device: str
) -> None:
    check_equal(
        SMALL,
        torch.float32,
        device,
        n_steps=6,
        betas=betas,
        weight_decay=weight_decay,
        n_decayed=n_decayed,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("before", [0, 1, 9, 1_000, 1_000_000])
def test_bias_correction_at_any_step(before: int, device: str) -> None:
    ours, theirs = Weights(SMALL, torch.float32, device), Weights(SMALL, torch.float32, device)
    for weights in (ours, theirs):
        weights.step.fill_(before)
    list(run(ours, "triton", n_steps=2))
    list(run(theirs, "reference", n_steps=2))
    assert float(ours.step) == before + 2
    check_close(ours.parameters, theirs.parameters)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_of_two_dtypes_are_two_launches_and_one_step(device: str) -> None:
    def joined() -> Weights:
        both = Weights([*SMALL, Spec("rows", 5, "b", width=3, sizes=(2, 1))], torch.float32, device)
        first = both.sites[0]
        both.sites = SiteTable([in_bf16(first), both.sites[1]])
        return both

    ours, theirs = joined(), joined()
    assert ours.sites.plans is not None and len(ours.sites.plans) == 2
    list(run(ours, "triton"))
    list(run(theirs, "reference"))
    assert float(ours.step) == 3
    check_close(ours.parameters, theirs.parameters)
    ours.check_counters()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_alone(dtype: torch.dtype, device: str) -> None:
    weights = Weights(ALL_LAYOUTS, dtype, device)
    before = [tensor.clone() for tensor in weights.state]
    weights.poison()
    write_updated_rows(weights.sites, weights.parameters, backend="triton")
    weights.check_rows()
    weights.check_counters()
    assert all(torch.equal(*pair) for pair in zip(weights.state, before, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_a_plain_list_of_sites_will_do(device: str) -> None:
    weights = Weights(SMALL, torch.bfloat16, device)
    weights.poison()
    write_updated_rows(list(weights.sites), weights.parameters, backend="triton")
    weights.check_rows()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_rows_at_multiples_of_16_bytes_count_as_aligned(layout: str) -> None:
    for width, expected in ((24, layout in ("rows", "fused", "expert")), (20, False)):
        (plan,) = Weights([Spec(layout, 11, "a", width=width)], torch.bfloat16).sites.plans or ()
        assert plan.strided is not expected


def test_counters_and_rows_belong_to_one_slice_each() -> None:
    weights = Weights(ALL_LAYOUTS, torch.float32)
    (plan,) = weights.sites.plans or ()
    slices = [dict(zip(FIELDS, row, strict=True)) for row in plan.slices.tolist()]
    blocks = {entry["vector"]: entry for entry in slices}.values()
    used = [0, *range(1, 1 + len(slices))]
    for entry in blocks:
        n_blocks = -(-entry["width"] // BLOCK_D)
        used.extend(range(entry["block_counter"], entry["block_counter"] + n_blocks))
    assert sorted(used) == list(range(len(plan.counters)))
    rows = [i for e in slices for i in range(e["first_row"], e["first_row"] + e["n_rows"])]
    assert rows == list(range(plan.rows.shape[1]))
    assert max(entry["n_rows"] for entry in slices) <= SLICE_ROWS
    assert sum(e["n_siblings"] for e in blocks) == len(slices)


def test_what_the_kernel_cannot_serve_takes_the_reference() -> None:
    shared = Weights([Spec("rows", 5, "a"), Spec("rows", 5, "a")], torch.float32)
    first = shared.sites[0]
    assert SiteTable([in_bf16(first), shared.sites[1]]).plans is None
    assert Weights(SMALL, torch.float64).sites.plans is None
    assert Weights([], torch.float32).sites.plans is None
    wide = Weights(SMALL, torch.float64)
    list(run(wide, "triton"))
    assert float(wide.step) == 3
    wide.check_rows()


def test_parameters_must_be_tiled_by_the_sites() -> None:
    weights = Weights([*SMALL, Spec("rows", 5, "b")], torch.float32)
    with pytest.raises(ValueError, match="belong to no site"):
        write_updated_rows(weights.sites[1:], weights.parameters, backend="triton")
    with pytest.raises(ValueError, match="every parameter must belong"):
        write_updated_rows(weights.sites, weights.parameters[:-1], backend="triton")
    overlapping = Weights(SMALL, torch.float32), Weights(SMALL, torch.float32)
    with pytest.raises(ValueError, match="belong to several"):
        _ = SiteTable([*overlapping[0].sites, *overlapping[1].sites]).n_parameters


# What only a GPU can show: programs that run at the same time.

MANY = [
    Spec("rows", 3000, "a", width=4096, sizes=(1200, 900, 1, 0, 400)),
    Spec("transposed", 3000, "a", width=4096, sizes=(70, 0, 1, 0, 400)),
    *[Spec("rows", 400, f"{i}", width=1000, sizes=(10, 300)) for i in range(20)],
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_programs_at_once(dtype: torch.dtype) -> None:
    check_equal(MANY, dtype, "cuda", n_steps=20)


@pytest.mark.gpu
def test_same_bits_every_time() -> None:
    first, second = Weights(MANY, torch.bfloat16, "cuda"), Weights(MANY, torch.bfloat16, "cuda")
    list(run(first, "triton", n_steps=20))
    list(run(second, "triton", n_steps=20))
    for found, expected in zip(
        [*first.state, *first.wholes], [*second.state, *second.wholes], strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.gpu
def test_a_captured_step_replays() -> None:
    def one_step(weights: Weights, gradient: torch.Tensor, lr: torch.Tensor) -> None:
        neuron_adamw(
            weights.sites,
            weights.parameters,
            gradient,
            weights.exp_avg,
            weights.exp_avg_sq,
            weights.step,
            lr,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.01,
            n_decayed=weights.n_vectors,
        )

    eager, captured = (Weights(ALL_LAYOUTS, torch.bfloat16, "cuda") for _ in range(2))
    gradient = torch.zeros_like(eager.parameters)
    lr = torch.tensor(0.0, device="cuda")
    at_first = [tensor.clone() for tensor in captured.state]
    one_step(captured, gradient, lr)  # makes the plan and compiles
    for tensor, value in zip(captured.state, at_first, strict=True):
        tensor.copy_(value)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_step(captured, gradient, lr)
    for i, drawn in enumerate(gradients(eager, 5)):
        gradient.copy_(drawn)
        lr.fill_(0.02 / (i + 1))
        one_step(eager, gradient, lr)
        graph.replay()
        for found, expected in zip(captured.state, eager.state, strict=True):
            assert torch.equal(found, expected)
        captured.check_rows()
    assert float(captured.step) == 5
