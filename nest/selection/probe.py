"""Scores: how much each neuron tells unsafe prompts from safe ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nest.errors import InputError

# Least spread within a kind that counts, as a share of a neuron's spread over all prompts.
MIN_SPREAD = 0.01


@dataclass(frozen=True)
class Probe:
    """Linear probes of one site, averaged over seeds.

    Attributes:
        weights: Mean weight of each neuron, fp64 (F,); positive means unsafe.
        held_out_accuracy: Mean accuracy on the prompts each probe did not see, in [0, 1].
    """

    weights: NDArray[np.float64]
    held_out_accuracy: float


def fit_probe(
    pooled: NDArray[np.float32],
    unsafe: NDArray[np.bool_],
    *,
    seeds: Sequence[int],
    held_out: float,
    strength: float,
    groups: NDArray[np.int64] | None = None,
) -> Probe:
    """Logistic regression p(unsafe) = sigmoid(w.h + b), one a seed, on splits of their own.

    The paper averages several random initialisations; the ridge makes the optimum unique, so what
    varies here is which prompts are held out. Activations are divided by one number, the site's
    standard deviation, so that the ridge means the same at every site; neurons keep their scale.

    Args:
        pooled: Pooled activations (B, F).
        unsafe: Label of each prompt (B,).
        seeds: One probe each.
        held_out: Share of prompts, or of groups, held out.
        strength: scikit-learn's C, the inverse of the penalty.
        groups: Prompts of one group (a matched pair) are never split between fit and held-out part.

    Returns:
        The averaged weights and the mean held-out accuracy.

    Source: arXiv 2602.16835, section 3.3.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupShuffleSplit, StratifiedShuffleSplit

    scale = float(pooled.std()) or 1.0
    features = np.asarray(pooled, dtype=np.float64) / scale
    weights, accuracies = [], []
    for seed in seeds:
        splitter = (
            StratifiedShuffleSplit(1, test_size=held_out, random_state=seed)
            if groups is None
            else GroupShuffleSplit(1, test_size=held_out, random_state=seed)
        )
        try:
            fit, test = next(splitter.split(features, unsafe, groups))
        except ValueError as fault:
            raise InputError(
                f"{len(unsafe)} prompts cannot be split with held_out {held_out:g}: {fault}"
            ) from None
        with warnings.catch_warnings():
            # A probe stopped at 1,000 iterations ranks neurons as well as a converged one.
            warnings.simplefilter("ignore", ConvergenceWarning)
            probe = LogisticRegression(C=strength, max_iter=1000).fit(features[fit], unsafe[fit])
        weights.append(probe.coef_[0])
        accuracies.append(float(probe.score(features[test], unsafe[test])))
    return Probe(np.mean(weights, axis=0), float(np.mean(accuracies)))


def contrast(
    pooled: NDArray[np.float32],
    unsafe: NDArray[np.bool_],
    groups: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """Standardised mean difference of each neuron between unsafe and safe prompts.

        d = (mean_unsafe - mean_safe) / sqrt((var_unsafe + var_safe) / 2)
        paired: d = mean(difference) / std(difference), over the pairs

    Args:
        pooled: Pooled activations (B, F).
        unsafe: Label of each prompt (B,).
        groups: Number of the pair each prompt belongs to, one unsafe and one safe prompt a pair.

    Returns:
        One number a neuron (F,); a neuron that never changes gets zero.
    """
    values = np.asarray(pooled, dtype=np.float64)
    if groups is not None:
        order = np.argsort(groups, kind="stable")
        first = values[order][unsafe[order]]
        second = values[order][~unsafe[order]]
        difference = first - second  # (pairs, F)
        mean, spread = difference.mean(axis=0), difference.std(axis=0)
    else:
        first, second = values[unsafe], values[~unsafe]
        mean = first.mean(axis=0) - second.mean(axis=0)
        spread = np.sqrt((first.var(axis=0) + second.var(axis=0)) / 2.0)
    # A neuron that is constant within each kind separates perfectly; it must not get zero.
    spread = np.maximum(spread, MIN_SPREAD * values.std(axis=0))
    standardised: NDArray[np.float64] = np.divide(
        mean, spread, out=np.zeros_like(mean), where=spread > 0
    )
    return standardised


def z_scores(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance from the site's mean weight in its standard deviations.

    Args:
        weights: One a neuron (F,).

    Returns:
        z (F,), all zero where the weights do not differ.

    Source: arXiv 2602.16835, section 3.3, equation for z_i.
    """
    spread = float(weights.std())
    if spread == 0.0:
        return np.zeros_like(weights)
    centred: NDArray[np.float64] = (weights - weights.mean()) / spread
    return centred


def check_labels(n_unsafe: int, n_safe: int) -> None:
    """Refuse a comparison that cannot be made.

    Raises:
        InputError: fewer than five prompts of a kind.
    """
    for kind, n in (("unsafe", n_unsafe), ("safe", n_safe)):
        if n < 5:
            raise InputError(
                f"there are {n} {kind} prompts; give at least 5 of each kind (some hundreds are better)"
            )
