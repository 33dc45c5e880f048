"""Sites on weights of every layout, with what surrounds them, for the kernels of `neuron_adamw`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nest_kernels.neuron_adamw import SiteRows, SiteTable, updated_rows

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for CPUs"),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Spec:
    """One site: how its weight lies in memory, and what is chosen.

    Sites of one group share their vectors; a cluster may have no row at one or all of them.
    """

    layout: str
    n_rows: int
    group: str
    width: int = 20
    sizes: tuple[int, ...] = (3, 1)  # of the clusters
    loaded: bool = True


def laid_out(layout: str, n_rows: int, width: int) -> tuple[tuple[int, ...], str]:
    """Shape of the whole tensor, and its view as (F, D)."""
    return {
        "rows": ((n_rows, width), "whole"),
        "transposed": ((width, n_rows), "whole.T"),  # Conv1D, and columns of down_proj
        "fused": ((2 * n_rows + 3, width), f"whole[{n_rows + 1}:{2 * n_rows + 1}]"),
        "fused columns": ((n_rows, width + 5), f"whole[:, 3:{width + 3}]"),
        "expert": ((3, n_rows, width), "whole[1]"),
        "transposed expert": ((3, width, n_rows + 2), f"whole[2, :, 1:{n_rows + 1}].T"),
    }[layout]


LAYOUTS = ("rows", "transposed", "fused", "fused columns", "expert", "transposed expert")


class Weights:
    """Sites, their packed parameters with Adam's state, and all the memory around the rows."""

    def __init__(
        self, specs: list[Spec], dtype: torch.dtype, device: str = "cpu", seed: int = 0
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        firsts: dict[str, int] = {}
        n = 0
        for spec in specs:
            if spec.group not in firsts:
                firsts[spec.group] = n
                n += len(spec.sizes) * spec.width
        self.n_vectors = n
        self.wholes: list[Tensor] = []
        sites: list[SiteRows] = []
        for spec in specs:
            shape, view = laid_out(spec.layout, spec.n_rows, spec.width)
            whole = torch.randn(shape, generator=draw).to(dtype).to(device)
            weight = eval(view, {"whole": whole})
            clusters = torch.arange(len(spec.sizes)).repeat_interleave(torch.tensor(spec.sizes))
            clusters = clusters[torch.randperm(len(clusters), generator=draw)].to(device)
            neurons = torch.randperm(spec.n_rows, generator=draw)[: len(clusters)].to(device)
            sites.append(
                SiteRows(
                    weight=weight,
                    neurons=neurons,
                    originals=weight[neurons].clone(memory_format=torch.contiguous_format),
                    clusters=clusters,
                    n_clusters=len(spec.sizes),
                    first_vector=firsts[spec.group],
                    first_loading=n if spec.loaded else None,
                )
            )
            n += len(neurons) if spec.loaded else 0
            self.wholes.append(whole)
        self.sites = SiteTable(sites)
        self.parameters = torch.randn(n, generator=draw).to(device)
        self.exp_avg = torch.zeros_like(self.parameters)
        self.exp_avg_sq = torch.zeros_like(self.parameters)
        self.step = torch.zeros((), device=device)
        self.surroundings = self._surroundings()

    @property
    def state(self) -> list[Tensor]:
        return [self.parameters, self.exp_avg, self.exp_avg_sq, self.step]

    def poison(self) -> None:
        """NaN into every number that a step is to write in the weights."""
        for site in self.sites:
            site.weight.index_fill_(0, site.neurons, torch.nan)

    def _surroundings(self) -> list[Tensor]:
        """All memory of the weights, zeros in place of the chosen rows."""
        kept = [site.weight[site.neurons].clone() for site in self.sites]
        for site in self.sites:
            site.weight.index_fill_(0, site.neurons, 0.0)
        found = [whole.clone() for whole in self.wholes]
        for site, rows in zip(self.sites, kept, strict=True):
            site.weight.index_copy_(0, site.neurons, rows)
        return found

    def check_rows(self) -> None:
        """Chosen rows are `updated_rows` of the parameters as they are; nothing else has changed."""
        for site in self.sites:
            expected = updated_rows(
                site.originals,
                site.vectors(self.parameters),
                site.clusters,
                site.loadings(self.parameters),
            )
            assert torch.equal(site.weight[site.neurons], expected)
        for found, before in zip(self._surroundings(), self.surroundings, strict=True):
            assert torch.equal(found, before)

    def check_counters(self) -> None:
        for plan in self.sites.plans or ():
            assert not plan.counters.any()
