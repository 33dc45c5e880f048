"""Settings of the selection stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nest.activations.config import Pool
from nest.errors import InputError

Scorer = Literal["probe", "contrast"]
Side = Literal["positive", "both"]
ClusterScope = Literal["projection", "layer"]
_NONE = type(None)
UpdateForm = Literal["shared", "loaded"]


@dataclass(frozen=True)
class SelectionConfig:
    """How neurons are captured, scored and clustered.

    Attributes:
        z_threshold: A neuron is kept when its score lies more than this many standard deviations
            from its site's mean, on a side that counts.
        side: `positive`: neurons that speak for unsafe (the paper's); `both`: also those that speak
            for safe, as far below the mean and negative.
        pool: How a neuron's activations over the tokens of a prompt become one number.
        scorer: `probe`: weights of a logistic regression; `contrast`: standardised mean difference.
        cluster_scope: `projection`: every site on its own, profiles standardised; `layer`: a layer's
            sites together, raw profiles. The best silhouette decides how many clusters there are.
        layers: First layer to look in and the layer after the last one (None: to the end); None for
            all. Nothing is run above the last.
        max_clusters: Upper bound on clusters a group; None means 4 a projection, 2 a layer.
        n_probe_seeds: Probes a site, each with its own held-out part; their weights are averaged.
        held_out: Share of the prompts that a probe does not see, in (0, 1).
        probe_strength: Inverse of the probe's ridge penalty (scikit-learn's C), on activations
            divided by the site's standard deviation.
        max_profile_prompts: Prompts of which a neuron's activations are kept in the selection.
        memory_bound_bytes: Pooled activations beyond this go to a temporary file.
        seed: Of splits and k-means.
    """

    z_threshold: float = 3.0
    side: Side = "positive"
    pool: Pool = "max"
    scorer: Scorer = "probe"
    cluster_scope: ClusterScope = "projection"
    layers: tuple[int, int | None] | None = None
    max_clusters: int | None = None
    n_probe_seeds: int = 3
    held_out: float = 0.2
    probe_strength: float = 1.0
    max_profile_prompts: int = 256
    memory_bound_bytes: int = 2 * 1024**3
    seed: int = 0

    def __post_init__(self) -> None:
        faults = []
        if not math.isfinite(self.z_threshold):
            faults.append(f"z_threshold is {self.z_threshold}; it must be a finite number")
        for name, allowed in (
            ("side", ("positive", "both")),
            ("pool", ("max", "mean", "last")),
            ("scorer", ("probe", "contrast")),
            ("cluster_scope", ("projection", "layer")),
        ):
            if getattr(self, name) not in allowed:
                faults.append(f"{name} is {getattr(self, name)!r}; choose {' or '.join(allowed)}")
        faults += layer_faults(self.layers)
        if self.max_clusters is not None and self.max_clusters < 1:
            faults.append(f"max_clusters is {self.max_clusters}; it must be at least 1")
        if self.n_probe_seeds < 1:
            faults.append(f"n_probe_seeds is {self.n_probe_seeds}; it must be at least 1")
        if not 0.0 < self.held_out < 1.0:
            faults.append(f"held_out is {self.held_out}; it must lie between 0 and 1")
        if self.probe_strength <= 0:
            faults.append(f"probe_strength is {self.probe_strength}; it must be positive")
        if self.max_profile_prompts < 1:
            faults.append(
                f"max_profile_prompts is {self.max_profile_prompts}; it must be at least 1"
            )
        if self.memory_bound_bytes < 0:
            faults.append(f"memory_bound_bytes is {self.memory_bound_bytes}; it cannot be negative")
        if not 0 <= self.seed < 2**32 - self.n_probe_seeds:
            faults.append(
                f"seed is {self.seed}; it must lie in 0 to {2**32 - 1 - self.n_probe_seeds}"
            )
        if faults:
            raise InputError("selection settings: " + "; ".join(faults))


def in_range(layer: int, layers: tuple[int, int | None]) -> bool:
    """Whether a layer is one of `layers[0]` to `layers[1]` - 1; None is no upper end."""
    first, end = layers
    return first <= layer and (end is None or layer < end)


def range_text(layers: tuple[int, int | None]) -> str:
    """As the command line takes it, such as `8:24` or `8:`."""
    first, end = layers
    return f"{first}:{'' if end is None else end}"


def layer_faults(layers: tuple[int, int | None] | None) -> list[str]:
    """What is wrong with a range of layers; nothing, or one sentence."""
    if layers is None:
        return []
    whole = isinstance(layers, tuple) and [type(end) for end in layers] in (
        [int, int],
        [int, _NONE],
    )
    if not whole:
        return [f"layers is {layers!r}; it must be (first, end), end being a number or None"]
    if layers[0] >= 0 and (layers[1] is None or layers[0] < layers[1]):
        return []
    return [f"layers is {range_text(layers)}; the first must be below the end, both from 0"]
