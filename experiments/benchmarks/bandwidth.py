"""Two measures of the optimizer step that need a GPU: memory bandwidth of its rows, and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.benchmarks.arms import LEARNING_RATE
from experiments.benchmarks.shapes import Shape
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.update import trainable
from nest_kernels.neuron_adamw import SiteRows, SiteTable, adamw_step, neuron_adamw, updated_rows

WIDTH, ROWS_A_CLUSTER = 4096, 96
N_ELEMENTS = 24_576 * WIDTH  # 100.7 M
BETAS, EPS = (0.9, 0.999), 1e-8
GRAPH_STEPS = 5

Step = Callable[[], object]


@dataclass(frozen=True)
class Moved:
    """What is timed, and how much memory it has to read and write.

    Attributes:
        step: One call.
        n_bytes: What must be moved at least; tables of indices and repeated reads are not counted.
    """

    step: Step
    n_bytes: int


@contextmanager
def row_arms(
    device: torch.device, *, n_elements: int = N_ELEMENTS, width: int = WIDTH
) -> Iterator[tuple[dict[str, Moved], bool]]:
    """A step on all rows of one bf16 weight in random order, a copy of as much, and the gate."""
    n_rows = n_elements // width
    draw = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device)

    weight = noise(n_rows, width).bfloat16()
    neurons = torch.randperm(n_rows, generator=draw, device=device)
    n_clusters = max(1, n_rows // ROWS_A_CLUSTER)
    rows = SiteRows(
        weight=weight,
        neurons=neurons,
        originals=weight[neurons],
        clusters=torch.arange(n_rows, device=device) % n_clusters,
        n_clusters=n_clusters,
        first_vector=0,
        first_loading=n_clusters * width,
    )
    table = SiteTable([rows])
    packed = noise(n_clusters * width + n_rows)
    gradient, moments = noise(len(packed)), [torch.zeros_like(packed) for _ in range(2)]
    step, rate = torch.zeros((), device=device), torch.tensor(LEARNING_RATE, device=device)
    settings = {"betas": BETAS, "eps": EPS, "weight_decay": 0.0, "n_decayed": n_clusters * width}

    def ours() -> None:
        neuron_adamw(table, packed, gradient, *moments, step, rate, **settings)

    source, target = weight.clone(), torch.empty_like(weight)
    twin, twin_moments = packed.clone(), [moment.clone() for moment in moments]
    adamw_step(twin, gradient, *twin_moments, step.clone(), rate, **settings)
    ours()
    expected = updated_rows(
        rows.originals, rows.vectors(packed), rows.clusters, rows.loadings(packed)
    )
    # fused multiply-adds on one side only: fp32 rounding
    same = torch.allclose(packed, twin, rtol=1e-5, atol=1e-7)
    moves = weight.numel() * weight.element_size()
    # W0 is read and W written; parameter and moments are read and written, the gradient read
    state = 7 * packed.numel() * packed.element_size()
    yield (
        {
            "nest": Moved(ours, 2 * moves + state),
            "copy": Moved(lambda: target.copy_(source), 2 * moves),
        },
        same and torch.equal(weight[neurons], expected),
    )


@contextmanager
def graph_arms(shape: Shape, device: torch.device) -> Iterator[tuple[dict[str, Step], bool]]:
    """The optimizer's step as it is and replayed from a CUDA graph, and whether they agree bitwise."""
    model = shape.model(device)
    with trainable(model, shape.selection(model)) as update:
        draw = torch.Generator(device).manual_seed(0)
        update.packed.grad = torch.randn(update.packed.shape, generator=draw, device=device)
        optimizer = NeuronAdamW(update, lr=LEARNING_RATE)
        optimizer.step()  # makes the state and the launch's tables
        start = _state(optimizer)
        for _ in range(GRAPH_STEPS):
            optimizer.step()
        eager = [*_state(optimizer), *_rows(optimizer)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        with torch.no_grad():
            for value, old in zip(_state(optimizer, copied=False), start, strict=True):
                value.copy_(old)
        for _ in range(GRAPH_STEPS):
            graph.replay()
        replayed = [*_state(optimizer), *_rows(optimizer)]
        same = all(torch.equal(a, b) for a, b in zip(eager, replayed, strict=True))
        yield {"eager": optimizer.step, "replay": graph.replay}, same


def _state(optimizer: NeuronAdamW, *, copied: bool = True) -> list[Tensor]:
    packed = optimizer.update.packed
    state = optimizer.state[packed]
    values = [packed.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"]]
    return [value.clone() for value in values] if copied else values


def _rows(optimizer: NeuronAdamW) -> list[Tensor]:
    return [site.weight[site.neurons] for site in optimizer.update.rows]
