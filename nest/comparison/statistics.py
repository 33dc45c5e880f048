"""Intervals, tests and orders of a comparison, from shares of behaviours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from nest.errors import InputError
from nest.evaluation.metrics import Interval, interval_of_shares

Shares = Float[np.ndarray, " _"]
"""One number a behaviour: the share of its prompts, attacks and seeds with the outcome in question."""


def pooled_mean(shares: Sequence[Shares]) -> float:
    """Mean over worlds of the mean over behaviours: a large world weighs no more than a small one."""
    return float(np.mean([each.mean() for each in shares]))


def pooled_interval(shares: Sequence[Shares], *, resamples: int, seed: int = 0) -> Interval:
    """95 % percentile bootstrap of `pooled_mean`, behaviours drawn anew within each world.

    Where all shares are equal a bootstrap has no width; then it is Wilson's interval of as many trials as
    there are behaviours.

    Args:
        shares: For each world.
        resamples: Number of bootstrap samples.
        seed: Of a NumPy generator of this call's own.

    Source:
        Efron & Tibshirani 1993, "An introduction to the bootstrap", 8 (several samples).
    """
    from scipy.stats import bootstrap

    everything = np.concatenate(shares)
    if np.ptp(everything) == 0:
        return interval_of_shares(everything, seed)
    kept = [each if len(each) > 1 else np.repeat(each, 2) for each in shares]
    found = bootstrap(
        kept,
        lambda *worlds, axis: np.mean([np.mean(each, axis=axis) for each in worlds], axis=0),
        n_resamples=resamples,
        batch=100,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def paired_p(
    first: Sequence[Shares], second: Sequence[Shares], *, resamples: int, seed: int = 0
) -> float:
    """Two-sided p of a difference between two arms' `pooled_mean`s, by swapping arms within behaviours.

    Args:
        first, second: For each world, the same behaviours in the same order.
        resamples: Random swaps; the smallest p there can be is about 1 / resamples.
        seed: Of a NumPy generator of this call's own.

    Source:
        Fisher 1935, "The design of experiments", 21 (the paired permutation test).
    """
    from scipy.stats import permutation_test

    weights = np.concatenate([np.full(len(each), 1 / (len(first) * len(each))) for each in first])
    ours, theirs = np.concatenate(first), np.concatenate(second)
    if np.array_equal(ours, theirs) or len(ours) < 2:
        return 1.0
    found = permutation_test(
        (ours, theirs),
        lambda a, b, axis: np.sum(weights * (a - b), axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=100,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """The p-values, corrected for there being several.

    Raises:
        InputError: statsmodels is not installed.

    Source:
        Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    if not p_values:
        return {}
    try:
        from statsmodels.stats.multitest import multipletests
    except ImportError:
        raise InputError(
            "comparing arms needs statsmodels: pip install 'nest-safety[compare]'"
        ) from None
    corrected = multipletests(list(p_values.values()), method="holm")[1]
    return dict(zip(p_values, map(float, corrected), strict=True))


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each point whether no other is better in one coordinate and as good in the other.

    Less is better in both.
    """
    return [
        not any(x <= own[0] and y <= own[1] and (x < own[0] or y < own[1]) for x, y in points)
        for own in points
    ]


def first_stays(values: Sequence[float], at_most: float) -> int | None:
    """Index from which on no value is above a level; None where the last one is.

    A curve that dips under the level and comes up again has not reached it.
    """
    above = [index for index, value in enumerate(values) if value > at_most]
    first = above[-1] + 1 if above else 0
    return first if first < len(values) else None
