"""Groups of neurons that fire together: k-means on activation profiles, k by silhouette."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nest.selection.config import LEARNING, Scorer

# Below this silhouette a split says nothing; the neurons stay one cluster (the paper's value).
MIN_SILHOUETTE = 0.1
# Most clusters a group where the user does not say. Per layer the paper makes at most two. Per
# projection it sets no bound, but its counts fit two or three nearly everywhere. Without one, the four
# sites of our second world got 66 clusters instead of 11, and the update 8,670 parameters instead of
# 1,630: more than the half percent of the model that we allow.
MAX_CLUSTERS = {"projection": 4, "layer": 2}

# Neurons that are chosen by what they do to refusals share one vector a site; loadings give each its sign.
MAX_CLUSTERS_OF: Mapping[Scorer | None, int] = dict.fromkeys(LEARNING, 1)


@dataclass(frozen=True)
class Clusters:
    """A grouping of N neurons.

    Attributes:
        labels: Cluster of each neuron, int64 (N,), in [0, K).
        n_clusters: K.
        silhouette: Mean silhouette of the chosen K, in [-1, 1]; None where one cluster was kept.
    """

    labels: NDArray[np.int64]
    n_clusters: int
    silhouette: float | None


def standardised(profiles: NDArray[np.float32]) -> NDArray[np.float64]:
    """Each neuron's profile (N, B) with mean 0 and standard deviation 1 over the prompts."""
    values = np.asarray(profiles, dtype=np.float64)
    spread = values.std(axis=1, keepdims=True)
    centred = values - values.mean(axis=1, keepdims=True)
    scaled: NDArray[np.float64] = centred / np.where(spread > 0, spread, 1.0)
    return scaled


def cluster_neurons(
    profiles: NDArray[np.float32] | NDArray[np.float64],
    *,
    max_clusters: int | None,
    n_clusters: int | None = None,
    seed: int = 0,
) -> Clusters:
    """k-means (Euclidean) with k by the best mean silhouette, ties to the smaller k.

    Args:
        profiles: One row a neuron (N, B).
        max_clusters: Largest k tried; None tries up to N - 1, the most a silhouette can judge.
        n_clusters: This k instead of the best one; at most N are made.
        seed: Of k-means.

    Returns:
        The grouping; one cluster where no k reaches a silhouette of 0.1.

    Source: arXiv 2602.16835, sections 3.4 and 4.2.
    """
    n = profiles.shape[0]
    if n_clusters is not None:
        k = min(n_clusters, n)
        labels = _kmeans(profiles, k, seed)
        return Clusters(labels, int(labels.max()) + 1, _silhouette(profiles, labels))
    best = Clusters(np.zeros(n, dtype=np.int64), 1, None)
    best_score = MIN_SILHOUETTE
    for k in range(2, min(n - 1, max_clusters or n) + 1):
        labels = _kmeans(profiles, k, seed)
        score = _silhouette(profiles, labels)
        if (
            score is not None
            and score >= best_score
            and (best.silhouette is None or score > best_score)
        ):
            best, best_score = Clusters(labels, int(labels.max()) + 1, score), score
    return best


def _kmeans(
    profiles: NDArray[np.float32] | NDArray[np.float64], k: int, seed: int
) -> NDArray[np.int64]:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Fewer distinct profiles than k: the labels come out with fewer clusters, which is right.
        warnings.simplefilter("ignore", ConvergenceWarning)
        raw = KMeans(k, n_init=10, random_state=seed).fit_predict(profiles)
    _, labels = np.unique(raw, return_inverse=True)
    return labels.astype(np.int64)


def _silhouette(
    profiles: NDArray[np.float32] | NDArray[np.float64], labels: NDArray[np.int64]
) -> float | None:
    from sklearn.metrics import silhouette_score

    if not 2 <= int(labels.max()) + 1 <= len(labels) - 1:
        return None
    return float(silhouette_score(profiles, labels))
