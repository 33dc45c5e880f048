"""Settings of the selection stage."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import Field, model_validator

from nest.activations.config import Pool
from nest.settings import AtLeastOne, Layers, NotNegative, Positive, Share, settings

Scorer = Literal["probe", "contrast"]
Side = Literal["positive", "both"]
ClusterScope = Literal["projection", "layer"]
UpdateForm = Literal["shared", "loaded"]
Control = Literal["random_neurons", "random_clusters", "lowest", "shuffled_labels"]
"""Selections of the same size that say nothing, to tell whether the choice does the work:

- `random_neurons`: as many neurons and clusters of the same sizes at every site, drawn at random from
  those that were not selected;
- `random_clusters`: the selected neurons, their clusters shuffled within each site;
- `lowest`: as many neurons and clusters at every site, the neurons with the smallest scores (nearest
  to the mean where both sides count);
- `shuffled_labels`: as many again, the highest scores after unsafe and safe prompts were mixed up.
"""


@settings("selection settings")
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

    z_threshold: Annotated[float, Parameter(name="--z")] = 3.0
    side: Side = "positive"
    pool: Pool = "max"
    scorer: Scorer = "probe"
    cluster_scope: ClusterScope = "projection"
    layers: Layers = None
    max_clusters: Annotated[int, AtLeastOne] | None = None
    n_probe_seeds: Annotated[int, AtLeastOne] = 3
    held_out: Annotated[float, Share] = 0.2
    probe_strength: Annotated[float, Positive] = 1.0
    max_profile_prompts: Annotated[int, AtLeastOne] = 256
    memory_bound_bytes: Annotated[int, NotNegative] = 2 * 1024**3
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _seeds_of_probes(self) -> SelectionConfig:
        if self.seed + self.n_probe_seeds > 2**32:
            raise ValueError(
                f"seed is {self.seed}; with {self.n_probe_seeds} probes it must lie in 0 to "
                f"{2**32 - self.n_probe_seeds}"
            )
        return self
