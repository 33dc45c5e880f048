"""Planted groups are found, and k is the one with the best silhouette."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

from nest.selection.clusters import cluster_neurons, standardised


def planted(k: int, n_each: int = 6, noise: float = 0.3, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(k, 50))
    return np.repeat(centres, n_each, axis=0) + noise * draw.normal(size=(k * n_each, 50))


def partition(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}


@pytest.mark.parametrize("k", [2, 3, 5])
def test_planted_groups_are_found(k: int) -> None:
    found = cluster_neurons(planted(k), max_clusters=None)
    assert found.n_clusters == k
    assert partition(found.labels) == {frozenset(range(6 * i, 6 * i + 6)) for i in range(k)}
    assert found.silhouette == pytest.approx(silhouette_score(planted(k), found.labels))


def test_k_is_the_best_of_all_by_silhouette() -> None:
    profiles = np.random.default_rng(3).normal(size=(12, 4))
    found = cluster_neurons(profiles, max_clusters=None, seed=1)
    scores = {
        k: silhouette_score(profiles, KMeans(k, n_init=10, random_state=1).fit_predict(profiles))
        for k in range(2, 12)
    }
    best = max(scores, key=lambda k: (scores[k], -k))
    assert found.n_clusters == best and found.silhouette == pytest.approx(scores[best])


def test_one_cluster_where_no_split_says_anything() -> None:
    blob = np.random.default_rng(0).normal(size=(30, 200))  # far apart from each other, all alike
    for profiles in (blob, np.ones((8, 5)), blob[:1], blob[:2]):
        found = cluster_neurons(profiles, max_clusters=None)
        assert (found.n_clusters, found.silhouette) == (1, None)
        assert not found.labels.any()


def test_the_bound_on_clusters_holds() -> None:
    assert cluster_neurons(planted(5), max_clusters=2).n_clusters <= 2
    assert cluster_neurons(planted(5), max_clusters=1).n_clusters == 1


@pytest.mark.parametrize("wanted", [1, 2, 4, 12, 50])
def test_a_number_of_clusters_can_be_asked_for(wanted: int) -> None:
    profiles = planted(3, n_each=4)
    found = cluster_neurons(profiles, max_clusters=None, n_clusters=wanted)
    assert found.n_clusters == min(wanted, 12)
    assert sorted(set(found.labels.tolist())) == list(range(found.n_clusters))
    same = cluster_neurons(np.ones((6, 3)), max_clusters=None, n_clusters=3)
    assert same.n_clusters == 1 and not same.labels.any()  # equal profiles cannot be told apart


def test_the_seed_decides() -> None:
    profiles = np.random.default_rng(0).normal(size=(20, 3))
    first = cluster_neurons(profiles, max_clusters=None, seed=4)
    assert np.array_equal(first.labels, cluster_neurons(profiles, max_clusters=None, seed=4).labels)


def test_standardised_profiles_forget_scale_and_offset() -> None:
    profiles = np.random.default_rng(0).normal(size=(5, 30)).astype(np.float32)
    found = standardised(profiles)
    np.testing.assert_allclose(found.mean(1), 0.0, atol=1e-12)
    np.testing.assert_allclose(found.std(1), 1.0)
    np.testing.assert_allclose(standardised(profiles * 8 + 2), found, rtol=1e-4, atol=1e-5)
    assert not standardised(np.full((2, 9), 3.0, dtype=np.float32)).any()
