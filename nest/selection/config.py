"""Settings of the selection stage."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import BeforeValidator, Field, model_validator

from nest.activations.config import Pool
from nest.errors import InputError
from nest.settings import AtLeastOne, Layers, NotNegative, Positive, Share, settings

Scorer = Literal["probe", "contrast", "effect", "gradient", "learned"]
LEARNING: tuple[Scorer, ...] = ("effect", "gradient", "learned")
"""Scorers that need dialogues: harmful prompts with refusals, benign ones with good answers."""
UNSIGNED: tuple[Scorer, ...] = ("gradient", "learned")
"""Scorers without a side."""
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


Z_THRESHOLD = 3.0
"""The paper's."""
PAPER: Mapping[str, Any] = {"scorer": "probe", "z_threshold": Z_THRESHOLD, "neurons": None}
"""What the paper's selection has that ours does not begin with (arXiv 2602.16835, section 3)."""
BUDGET = "5%"
"""Of the neurons that are looked at."""


def _budget(value: Any) -> Any:
    """A number, also where the command line gives a text; a share in (0, 100 %] as it was written."""
    if value is None:
        return None
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    good = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if isinstance(value, str) and value.endswith("%"):
        with suppress(ValueError):
            good = 0 < float(value.removesuffix("%")) <= 100
    if not good:
        raise ValueError(f"neurons is {value!r}; it must be a number from 1, or a share such as 3%")
    return value


@settings("selection settings")
class SelectionConfig:
    """How neurons are captured, scored and clustered.

    Attributes:
        z_threshold: A neuron is kept when its score lies more than this many standard deviations
            from its site's mean, on a side that counts; None means 3 for probe and contrast, where
            there is no budget.
        neurons: A budget instead: so many neurons, or such a share (`3%`) of all that are looked at, the
            strongest of all sites together; None means 5% for the scorers that learn from dialogues,
            where there is no threshold.
        side: `positive`: neurons that speak for unsafe (the paper's); `both`: also those that speak
            for safe, as far below the mean and negative; not for gradient and learned, which have no
            side.
        pool: How a neuron's activations over the tokens of a prompt become one number.
        scorer: `probe`: weights of a logistic regression; `contrast`: standardised mean difference;
            `effect`: that difference, not standardised, times what it does to refusals to first order;
            `gradient`: how much a change of the neuron's weights would gain to first order; `learned`:
            what training all neurons for a while made of them. The last three learn from dialogues. None
            takes gradient where there are such, and probe elsewhere.
        cluster_scope: `projection`: every site on its own, profiles standardised; `layer`: a layer's
            sites together, raw profiles. The best silhouette decides how many clusters there are.
        layers: First layer to look in and the layer after the last one (None: to the end); None for
            all. Nothing is run above the last.
        max_clusters: Upper bound on clusters a group; None means 4 a projection and 2 a layer, and 1 for
            the scorers that learn from dialogues.
        n_probe_seeds: Probes a site, each with its own held-out part; their weights are averaged.
        held_out: Share of the prompts that a probe does not see, in (0, 1).
        probe_strength: Inverse of the probe's ridge penalty (scikit-learn's C), on activations
            divided by the site's standard deviation.
        learning_epochs: Passes over the dialogues in which `learned` trains all neurons.
        max_profile_prompts: Prompts of which a neuron's activations are kept in the selection.
        memory_bound_bytes: Pooled activations beyond this go to a temporary file.
        seed: Of splits and k-means.
    """

    z_threshold: Annotated[float | None, Parameter(name="--z")] = None
    neurons: Annotated[
        int | str | None, BeforeValidator(_budget), Parameter("--neurons", metavar="N|P%")
    ] = None
    side: Side = "positive"
    pool: Pool = "max"
    scorer: Scorer | None = None
    cluster_scope: ClusterScope = "projection"
    layers: Layers = None
    max_clusters: Annotated[int, AtLeastOne] | None = None
    n_probe_seeds: Annotated[int, AtLeastOne] = 3
    held_out: Annotated[float, Share] = 0.2
    probe_strength: Annotated[float, Positive] = 1.0
    learning_epochs: Annotated[float, Positive] = 0.7
    max_profile_prompts: Annotated[int, AtLeastOne] = 256
    memory_bound_bytes: Annotated[int, NotNegative] = 2 * 1024**3
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def resolved(self, *, dialogues: bool) -> SelectionConfig:
        """The same with a scorer, and with a threshold or a budget.

        Args:
            dialogues: Whether there are some to learn from.

        Raises:
            InputError: both sides of a scorer that has one.
        """
        scorer: Scorer = self.scorer or ("gradient" if dialogues else "probe")
        if scorer in UNSIGNED and self.side == "both":
            raise InputError(
                f"side is both, and the scorer {scorer} tells how much and not which way; leave --side out"
            )
        if self.z_threshold is not None or self.neurons is not None:
            return replace(self, scorer=scorer)
        if scorer in LEARNING:
            return replace(self, scorer=scorer, neurons=BUDGET)
        return replace(self, scorer=scorer, z_threshold=Z_THRESHOLD)

    @property
    def threshold(self) -> float:
        """The z-score over which a neuron is kept, where there is no budget."""
        return Z_THRESHOLD if self.z_threshold is None else self.z_threshold

    def budget(self, n_neurons: int) -> int | None:
        """How many of so many neurons are kept, at least one; None where the threshold decides."""
        if self.neurons is None:
            return None
        if isinstance(self.neurons, int):
            return min(self.neurons, n_neurons)
        return max(1, round(float(self.neurons.removesuffix("%")) / 100 * n_neurons))

    @model_validator(mode="after")
    def _one_of_both(self) -> SelectionConfig:
        if self.z_threshold is not None and self.neurons is not None:
            raise ValueError(
                f"z_threshold is {self.z_threshold:g} and neurons {self.neurons}; give one of them"
            )
        return self

    @model_validator(mode="after")
    def _seeds_of_probes(self) -> SelectionConfig:
        if self.seed + self.n_probe_seeds > 2**32:
            raise ValueError(
                f"seed is {self.seed}; with {self.n_probe_seeds} probes it must lie in 0 to "
                f"{2**32 - self.n_probe_seeds}"
            )
        return self
