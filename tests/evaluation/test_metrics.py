"""Intervals against closed forms and simulation."""

import math

import numpy as np
import pytest

from nest.evaluation.metrics import Rate, clustered_interval, paired_difference, wilson_interval


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (10, 10), (47, 100), (3, 1000)])
def test_wilson_ends_solve_its_equation(k, n):
    z = 1.959964
    for bound in wilson_interval(k, n):
        if 0 < bound < 1:  # |p - bound| = z sqrt(bound (1 - bound) / n)
            spread = z * math.sqrt(bound * (1 - bound) / n)
            assert abs(k / n - bound) == pytest.approx(spread, rel=1e-6)


def test_wilson_edges():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 20)[0] == 0.0
    assert wilson_interval(20, 20)[1] == 1.0
    low, high = wilson_interval(10, 100)
    assert (round(low, 4), round(high, 4)) == (0.0552, 0.1744)  # Wilson's own form, tabulated
    with pytest.raises(ValueError, match="3 successes out of 2"):
        wilson_interval(3, 2)


def test_clustering_widens_the_interval_of_outcomes_that_go_together():
    generator = np.random.default_rng(0)
    behaviours = generator.random(200) < 0.3
    together = np.repeat(behaviours[:, None], 8, axis=1)
    low, high = clustered_interval(together, seed=1)
    naive_low, naive_high = wilson_interval(int(together.sum()), together.size)
    assert high - low > 2 * (naive_high - naive_low)
    single_low, single_high = wilson_interval(int(behaviours.sum()), 200)
    # the same information as one attack: bootstrap noise of 2,000 samples leaves a few per cent
    assert high - low == pytest.approx(single_high - single_low, rel=0.15)
    assert (low, high) == clustered_interval(together, seed=1)


def test_unanimous_outcomes_still_have_a_width():
    assert clustered_interval(np.zeros((50, 4), dtype=bool), seed=0) == wilson_interval(0, 50)
    assert clustered_interval(np.ones((50, 4), dtype=bool), seed=0) == wilson_interval(50, 50)


def test_paired_difference_uses_the_pairing():
    before = np.linspace(0, 1, 40)
    mean, (low, high) = paired_difference(before.tolist(), (before - 0.25).tolist(), seed=0)
    assert mean == pytest.approx(-0.25)
    assert (low, high) == pytest.approx((-0.25, -0.25))


def test_rate():
    assert Rate.of([True, False, True]) == Rate(2, 3)
    assert Rate(0, 0).rate == 0.0
    assert Rate(1, 4).to_json() == {"rate": 0.25, "ci95": list(wilson_interval(1, 4)), "n": 4}
