"""Controls: selections of the same size that say nothing, to tell whether the choice does the work."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from nest.selection.config import Side
from nest.selection.selection import NeuronSelection

End = Literal["highest", "lowest"]


def random_neurons(selection: NeuronSelection, *, seed: int) -> NeuronSelection:
    """As many neurons and clusters of the same sizes at every site, the neurons drawn at random.

    Neurons that were selected are not drawn. Scores become zero and profiles are dropped, since they
    belong to the neurons that were replaced.

    Args:
        selection: What to match.
        seed: Of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in selection.sites:
        n = part.neurons.numel()
        free = torch.ones(part.site.length, dtype=torch.bool)
        free[part.neurons] = False
        others = free.nonzero().squeeze(1)
        if others.numel() < n:  # more than half of the site is selected: some must be drawn again
            others = torch.arange(part.site.length)
        chosen = others[torch.randperm(others.numel(), generator=generator)[:n]].sort().values
        shuffled = part.clusters[torch.randperm(n, generator=generator)]
        parts.append(
            replace(
                part,
                neurons=chosen,
                clusters=shuffled,
                scores=torch.zeros(n),
                profiles=None,
            )
        )
    provenance = {**selection.provenance, "control": "random neurons", "control_seed": seed}
    return replace(selection, sites=tuple(parts), provenance=provenance)


def random_clusters(selection: NeuronSelection, *, seed: int) -> NeuronSelection:
    """The same neurons with their cluster labels shuffled within each site.

    Args:
        selection: What to shuffle.
        seed: Of the shuffle.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [
        replace(
            part,
            clusters=part.clusters[torch.randperm(part.neurons.numel(), generator=generator)],
        )
        for part in selection.sites
    ]
    provenance = {**selection.provenance, "control": "random clusters", "control_seed": seed}
    return replace(selection, sites=tuple(parts), provenance=provenance)


def shuffled_labels(
    unsafe: NDArray[np.bool_], groups: NDArray[np.int64] | None, *, seed: int
) -> NDArray[np.bool_]:
    """Labels mixed up over all prompts; within pairs, which stay pairs, where there are such.

    Args:
        unsafe: Label of each prompt (B,).
        groups: Number of the pair each prompt belongs to, one unsafe and one safe prompt a pair.
        seed: Of the shuffle.
    """
    rng = np.random.default_rng(seed)
    if groups is None:
        return rng.permutation(unsafe)
    swapped = rng.random(int(groups.max()) + 1) < 0.5
    mixed: NDArray[np.bool_] = unsafe ^ swapped[groups]
    return mixed


def as_many(z: NDArray[np.float64], n: int, end: End, side: Side) -> NDArray[np.int64]:
    """The n neurons at one end of a site's scores, ascending.

    Args:
        z: Score of each neuron (F,).
        n: How many.
        end: `highest` or `lowest`.
        side: With `both` scores count by their distance from zero.
    """
    strength = np.abs(z) if side == "both" else z
    order = np.argsort(strength if end == "lowest" else -strength, kind="stable")
    chosen: NDArray[np.int64] = np.sort(order[:n]).astype(np.int64)
    return chosen
