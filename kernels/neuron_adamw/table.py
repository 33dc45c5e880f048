"""Sites that are used in step after step, with what is made of them once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from nest_kernels.neuron_adamw.plan import LaunchPlan, reachable
from nest_kernels.neuron_adamw.site_rows import SiteRows


@dataclass(frozen=True, eq=False)
class RowBatch:
    """Rows of several sites that the reference computes at once: of one width, dtype and device.

    Attributes:
        sites: Whose rows they are, in this order.
        originals: All their original rows, (R, D).
        vectors: Which row of the packed parameters, taken as (P // D, D), is added to each.
        loadings: Where each row's loading stands in the packed parameters; None where there are none.
        sizes: How many rows each site has.
    """

    sites: tuple[SiteRows, ...]
    originals: Tensor
    vectors: Int[Tensor, " R"]
    loadings: Int[Tensor, " R"] | None
    sizes: list[int]

    @staticmethod
    def of(sites: Sequence[SiteRows]) -> RowBatch:
        """Put the index tables together."""
        width = sites[0].originals.shape[1]
        loadings = [
            first + torch.arange(len(site.neurons), device=site.clusters.device)
            for site in sites
            if (first := site.first_loading) is not None
        ]
        return RowBatch(
            sites=tuple(sites),
            originals=torch.cat([site.originals for site in sites]),
            vectors=torch.cat([site.first_vector // width + site.clusters for site in sites]),
            loadings=torch.cat(loadings) if loadings else None,
            sizes=[len(site.neurons) for site in sites],
        )


class SiteTable(tuple[SiteRows, ...]):
    """Sites that are used in step after step: a tuple that makes its launch plans once.

    Whatever takes a sequence of `SiteRows` takes this. The plans are made by the first use on a GPU,
    which waits for the device: take one step before capturing a CUDA graph. They hold counters:
    two streams must not run steps on one table at the same time.
    """

    @cached_property
    def n_parameters(self) -> int:
        """How many packed parameters the sites' vectors and loadings tile.

        Raises:
            ValueError: two sites claim the same parameters, or there are gaps between them.
        """
        spans = {
            (site.first_vector, site.first_vector + site.n_clusters * site.originals.shape[1])
            for site in self
        }
        loadings = [
            (site.first_loading, site.first_loading + site.neurons.numel())
            for site in self
            if site.first_loading is not None and site.neurons.numel()
        ]
        end = 0
        for first, last in sorted([*spans, *loadings]):
            if first != end:
                raise ValueError(
                    f"packed parameters {min(first, end)} to {max(first, end)} belong to "
                    f"{'no site' if first > end else 'several'}; vectors and loadings of all sites must "
                    "tile them without gaps"
                )
            end = last
        return end

    @cached_property
    def batches(self) -> tuple[RowBatch, ...] | None:
        """What the reference writes at once; None where it goes site by site.

        That is: vectors of several widths, so that they are no matrix, sites on other devices than
        the packed parameters, loadings at some sites only.
        """
        widths = {site.originals.shape[1] for site in self}
        aligned = all(site.first_vector % max(widths) == 0 for site in self)
        loaded = {site.first_loading is not None for site in self}
        together = all(site.weight.device == site.clusters.device for site in self)
        if len(widths) != 1 or not aligned or len(loaded) != 1 or not together:
            return None
        by_dtype: dict[torch.dtype, list[SiteRows]] = {}
        for site in self:
            by_dtype.setdefault(site.weight.dtype, []).append(site)
        return tuple(RowBatch.of(sites) for sites in by_dtype.values())

    @cached_property
    def plans(self) -> tuple[LaunchPlan, ...] | None:
        """One plan for each dtype among the weights; None where only the reference can serve.

        That is: no vectors at all, sites on several devices, fp64, vectors shared by weights of
        different dtypes, memory that is not aligned to its own elements.
        """
        by_dtype: dict[torch.dtype, list[SiteRows]] = {}
        for site in self:
            by_dtype.setdefault(site.weight.dtype, []).append(site)
        groups = [{site.first_vector for site in sites} for sites in by_dtype.values()]
        one_device = len({site.weight.device for site in self}) == 1
        one_dtype_each = sum(map(len, groups)) == len(set().union(*groups))
        if not (one_device and one_dtype_each and self.n_parameters):
            return None
        if not all(reachable(site, sites[0]) for sites in by_dtype.values() for site in sites):
            return None
        return tuple(LaunchPlan.of(sites) for sites in by_dtype.values())
