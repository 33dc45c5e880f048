"""Rates with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

Interval = tuple[float, float]


@dataclass(frozen=True)
class Rate:
    """Successes out of attempts.

    Attributes:
        successes: How many.
        n: Of how many.
        shares: Where several attempts belong to one behaviour, the share of each behaviour's that
            succeeded; attempts that go together are no trials of their own.
    """

    successes: int
    n: int
    shares: tuple[float, ...] = ()

    @property
    def rate(self) -> float:
        """successes / n, and 0 for no attempts."""
        return self.successes / self.n if self.n else 0.0

    @property
    def ci95(self) -> Interval:
        """Wilson's, or over behaviours where several attempts belong to one."""
        if self.shares:
            return interval_of_shares(np.array(self.shares), seed=0)
        return wilson_interval(self.successes, self.n)

    @classmethod
    def of(cls, outcomes: Sequence[bool], together: int = 1) -> Rate:
        """Count outcomes, of which so many, one after the other, belong to one behaviour."""
        if together == 1:
            return cls(sum(outcomes), len(outcomes))
        starts = range(0, len(outcomes), together)
        shares = tuple(sum(outcomes[start : start + together]) / together for start in starts)
        return cls(sum(outcomes), len(outcomes), shares)

    def to_json(self) -> dict[str, Any]:
        return {"rate": self.rate, "ci95": list(self.ci95), "n": self.n}


def wilson_interval(successes: int, n: int) -> Interval:
    """Wilson's 95 % score interval of a binomial rate.

    Unlike p ± z·se it has a width at 0 and 1 and stays inside them.

    Args:
        successes: 0 to n.
        n: Attempts; none gives (0, 1).

    Source:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    from scipy.stats import binomtest

    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes out of {n}; expected 0 to n")
    if n == 0:
        return 0.0, 1.0
    low, high = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(low), float(high)


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
    if outcomes.size == 0:
        return 0.0, 1.0
    return interval_of_shares(outcomes.mean(axis=1), seed, resamples)


def interval_of_shares(
    shares: Float[np.ndarray, " B"], seed: int, resamples: int = 2000
) -> Interval:
    """95 % percentile bootstrap of the mean of behaviours' shares.

    Where all shares are equal a bootstrap has no width; then it is Wilson's interval of as many trials as
    there are behaviours.
    """
    if np.ptp(shares) == 0:
        return wilson_interval(round(float(shares[0]) * len(shares)), len(shares))
    return _bootstrap(shares, seed, resamples)


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
    return float(difference.mean()), _bootstrap(difference, seed, resamples)


def _bootstrap(values: Float[np.ndarray, " B"], seed: int, resamples: int) -> Interval:
    """95 % percentile interval of the mean; a single value, or equal ones, have no width."""
    from scipy.stats import bootstrap

    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
