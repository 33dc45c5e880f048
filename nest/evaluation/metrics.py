"""Rates with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

Interval = tuple[float, float]


@dataclass(frozen=True)
class Rate:
    """Successes out of attempts; its interval is Wilson's."""

    successes: int
    n: int

    @property
    def rate(self) -> float:
        """successes / n, and 0 for no attempts."""
        return self.successes / self.n if self.n else 0.0

    @property
    def ci95(self) -> Interval:
        return wilson_interval(self.successes, self.n)

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> Rate:
        return cls(sum(outcomes), len(outcomes))

    def to_json(self) -> dict[str, Any]:
        return {"rate": self.rate, "ci95": list(self.ci95), "n": self.n}


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> Interval:
    """Wilson's score interval of a binomial rate.

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n) with p = successes/n. Unlike p ± z·se it has a
    width at 0 and 1 and stays inside them.

    Args:
        successes: 0 to n.
        n: Attempts; none gives (0, 1).
        z: Normal quantile, 1.959964 for 95 %.

    Source:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes out of {n}; expected 0 to n")
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == n else (centre + spread) / scale
    return low, high


def clustered_interval(
    outcomes: Bool[np.ndarray, "B A"], seed: int, resamples: int = 2000
) -> Interval:
    """95 % percentile bootstrap of the mean over attacks, whole behaviours drawn with replacement.

    The same request under several attacks gives outcomes that go together, so counting each as a
    trial of its own would make the interval too narrow. Where every outcome is the same a bootstrap
    has no width; then it is Wilson's interval of as many trials as there are behaviours.

    Args:
        outcomes: (B behaviours, A attacks), whether each attack got its way.
        seed: Of a NumPy generator of this call's own.
        resamples: Number of bootstrap samples.

    Source:
        Field & Welsh 2007, "Bootstrapping clustered data" (the cluster bootstrap).
    """
    n_behaviours = outcomes.shape[0]
    if outcomes.size == 0:
        return 0.0, 1.0
    if outcomes.all() or not outcomes.any():
        return wilson_interval(n_behaviours if outcomes.all() else 0, n_behaviours)
    per_behaviour = outcomes.mean(axis=1)  # (B,)
    means = _bootstrap_means(per_behaviour, seed, resamples)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def paired_difference(
    before: Sequence[float], after: Sequence[float], seed: int, resamples: int = 2000
) -> tuple[float, Interval]:
    """Mean of after - before over the same behaviours, and its 95 % bootstrap interval.

    Args:
        before, after: One value a behaviour, such as the share of attacks that succeeded, same
        order.
    """
    difference = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    if difference.size == 0:
        raise ValueError("no behaviours to compare; expected at least one")
    low, high = np.quantile(_bootstrap_means(difference, seed, resamples), (0.025, 0.975))
    return float(difference.mean()), (float(low), float(high))


def _bootstrap_means(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(values), size=(resamples, len(values)))
    means: np.ndarray = values[draws].mean(axis=1)
    return means
