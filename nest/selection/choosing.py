"""Which neurons are kept: those over a threshold of their site, or the strongest of all sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from nest.activations.capture import Activations
from nest.errors import SelectionError
from nest.models.sites import NeuronSite
from nest.selection.config import SelectionConfig


@dataclass(frozen=True, eq=False)
class Scored:
    """What a scorer says of a site's neurons, and which of them are kept.

    Attributes:
        site: Where they are.
        weights: Score of each as the scorer gave it (F,); negative ones speak for the other side.
        z: The same in standard deviations from the site's mean (F,).
        rank: What neurons of several sites are put in order by (F,).
        neurons: Those that are kept, ascending.
        accuracy: Of a probe on prompts it did not see; None for the other scorers.
    """

    site: NeuronSite
    weights: NDArray[np.float64]
    z: NDArray[np.float64]
    rank: NDArray[np.float64]
    neurons: NDArray[np.int64] = field(default_factory=lambda: np.array([], dtype=np.int64))
    accuracy: float | None = None

    def sides(self, config: SelectionConfig) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which neurons speak for the first side, and which for the second where it counts (F,)."""
        return self.weights > 0, (self.weights < 0) & (config.side == "both")


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores of every site, and what neurons are grouped by.

    Attributes:
        scored: Every site that was looked at.
        features: For each site a vector a neuron (F, d), whose k-means makes the groups; None takes the
            neurons' activations.
        provenance: What deserves a record of how they came about.
    """

    scored: tuple[Scored, ...]
    features: Mapping[str, NDArray[np.float64]] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Ranker(Protocol):
    """Scores neurons by more than what they do on prompts."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Hashes and settings of all that its ranking depends on beside the model and the prompts."""
        ...

    def rank(self, activations: Activations, unsafe: NDArray[np.bool_]) -> Ranking:
        """Score the sites of these activations.

        Args:
            activations: Of all prompts at the sites that are looked at.
            unsafe: Label of each prompt (B,).
        """
        ...


def kept(scored: Sequence[Scored], config: SelectionConfig) -> list[Scored]:
    """The same with the neurons that the config keeps.

    Args:
        scored: Every site that was looked at.
        config: Its threshold, or its budget.
    """
    budget = config.budget(sum(one.z.size for one in scored))
    sides = [one.sides(config) for one in scored]
    if budget is None:
        high = config.threshold
        chosen = [
            (first & (one.z > high)) | (second & (one.z < -high))
            for one, (first, second) in zip(scored, sides, strict=True)
        ]
    else:
        ranks = np.concatenate(
            [np.where(a | b, one.rank, -np.inf) for one, (a, b) in zip(scored, sides, strict=True)]
        )
        strongest = np.argsort(-ranks, kind="stable")[:budget]
        among = np.zeros(ranks.size, dtype=bool)
        among[strongest[np.isfinite(ranks[strongest])]] = True
        chosen = np.split(among, np.cumsum([one.z.size for one in scored])[:-1])
    return [
        replace(one, neurons=np.flatnonzero(mask).astype(np.int64))
        for one, mask in zip(scored, chosen, strict=True)
    ]


def report_skipped(
    scored: Sequence[Scored], config: SelectionConfig, warn: Callable[[str], None] | None
) -> None:
    """Say which sites have no neurons.

    Raises:
        SelectionError: none has.
    """

    def largest(entry: Scored) -> float:
        return float(np.abs(entry.z).max() if config.side == "both" else entry.z.max())

    by_budget = config.neurons is not None
    if all(entry.neurons.size == 0 for entry in scored):
        if by_budget:
            raise SelectionError(
                f"no neuron's {config.scorer} score is above zero, so that none could be kept; give other "
                "prompts or dialogues, or choose another --scorer"
            )
        best = max(scored, key=largest)
        raise SelectionError(
            f"no neuron has a z-score over {config.threshold:g}; the largest found is "
            f"{largest(best):.2f} at {best.site.name}: lower --z below it"
        )
    found = sum(entry.neurons.size for entry in scored)
    wanted = config.budget(sum(entry.z.size for entry in scored))
    if warn and wanted is not None and found < wanted:
        warn(
            f"{wanted} neurons were asked for, and {found} speak for a side that counts; these are kept"
        )
    skipped = [entry for entry in scored if entry.neurons.size == 0]
    if warn and skipped and not by_budget:
        names = ", ".join(f"{e.site.name} (largest z {largest(e):.2f})" for e in skipped)
        warn(f"{len(skipped)} sites have no neuron over z {config.threshold:g}, skipped: {names}")
