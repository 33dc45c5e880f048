"""Intervals, tests and orders against cases that can be counted by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nest.comparison.statistics import (
    first_stays,
    front,
    holm,
    paired_p,
    pooled_interval,
    pooled_mean,
)
from nest.evaluation.metrics import wilson_interval


def test_a_large_world_weighs_no_more() -> None:
    assert pooled_mean([np.ones(100), np.zeros(2)]) == 0.5


def test_interval_covers() -> None:
    """Of 200 draws of known mean about 95 in 100 intervals hold it."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        worlds = [(rng.random(60) < 0.3).astype(float), (rng.random(40) < 0.5).astype(float)]
        low, high = pooled_interval(worlds, resamples=400)
        hits += low <= 0.4 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_interval_is_the_same_again_and_has_a_width_at_zero() -> None:
    worlds = [np.array([0.0, 1.0, 1.0, 0.0]), np.array([1.0])]
    assert pooled_interval(worlds, resamples=100) == pooled_interval(worlds, resamples=100)
    zeros = [np.zeros(20), np.zeros(10)]
    assert pooled_interval(zeros, resamples=100) == wilson_interval(0, 30)


def test_paired_p_against_all_swaps() -> None:
    """Six behaviours of two worlds: the share of all 64 swaps that differ at least as much."""
    first = [np.array([1.0, 1.0, 0.5, 1.0]), np.array([1.0, 0.0])]
    second = [np.array([0.0, 0.5, 0.5, 0.0]), np.array([0.0, 1.0])]
    weights = np.array([1 / 8] * 4 + [1 / 4] * 2)
    differences = weights * (np.concatenate(first) - np.concatenate(second))
    sums = [float(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=6)]
    observed = differences.sum()
    greater = np.mean([value >= observed - 1e-12 for value in sums])
    less = np.mean([value <= observed + 1e-12 for value in sums])
    found = paired_p(first, second, resamples=10_000)
    assert found == pytest.approx(min(1.0, 2 * min(greater, less)), abs=1e-9)


def test_paired_p_of_the_same_and_of_the_different() -> None:
    same = [np.array([0.0, 1.0, 1.0])]
    assert paired_p(same, same, resamples=100) == 1.0
    rng = np.random.default_rng(1)
    low, high = [rng.random(80) * 0.3], [0.5 + rng.random(80) * 0.3]
    assert paired_p(low, high, resamples=999) <= 0.002 + 1e-12


def test_paired_p_is_uniform_where_nothing_differs() -> None:
    rng = np.random.default_rng(2)
    found = [
        paired_p([rng.random(30)], [rng.random(30)], resamples=200, seed=index)
        for index in range(100)
    ]
    assert 0.01 <= np.mean(np.array(found) < 0.05) <= 0.12


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06}
    )
    assert holm({}) == {}


def test_front() -> None:
    points = [(1.0, 5.0), (2.0, 2.0), (3.0, 2.0), (5.0, 1.0), (2.0, 2.0)]
    assert front(points) == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([0.9, 0.3, 0.05, 0.2, 0.1, 0.0], 4),
        ([0.9, 0.2], None),
        ([0.0, 0.0], 0),
        ([0.05, 0.9, 0.1], 2),
    ],
)
def test_a_curve_must_stay_down(values: list[float], found: int | None) -> None:
    assert first_stays(values, 0.1) == found
