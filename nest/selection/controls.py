"""Controls: selections of the same size that say nothing, to tell whether the choice does the work."""

from __future__ import annotations

from dataclasses import replace

import torch

from nest.selection.selection import NeuronSelection


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
