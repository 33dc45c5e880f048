"""Probes and contrasts rank the neurons that differ, and held-out accuracy is held out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.linear_model

from nest.errors import InputError
from nest.selection.probe import check_labels, contrast, fit_probe, z_scores

B, F = 120, 40
PLANTED = (3, 17)


def data(strength: float = 2.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    unsafe = np.arange(B) < B // 2
    pooled = draw.normal(size=(B, F)).astype(np.float32)
    pooled[np.ix_(unsafe, PLANTED)] += strength
    return pooled, unsafe


def fit(pooled: np.ndarray, unsafe: np.ndarray, **changed: Any) -> Any:
    settings: dict[str, Any] = {"seeds": [0, 1, 2], "held_out": 0.2, "strength": 1.0} | changed
    return fit_probe(pooled, unsafe, **settings)


def test_planted_neurons_get_the_largest_positive_weights() -> None:
    pooled, unsafe = data()
    probe = fit(pooled, unsafe)
    assert set(np.argsort(probe.weights)[-2:]) == set(PLANTED)
    assert probe.held_out_accuracy > 0.9
    assert (fit(pooled, ~unsafe).weights[list(PLANTED)] < 0).all()


def test_accuracy_is_chance_where_nothing_differs() -> None:
    accuracies = [fit(*data(0.0, seed), seeds=range(5)).held_out_accuracy for seed in range(4)]
    assert (
        0.35 < np.mean(accuracies) < 0.65
    )  # 480 held-out answers in all: a deviation of 0.02 each


def test_seeds_decide_and_units_do_not_matter() -> None:
    pooled, unsafe = data()
    first = fit(pooled, unsafe)
    assert np.array_equal(first.weights, fit(pooled, unsafe).weights)
    assert not np.array_equal(first.weights, fit(pooled, unsafe, seeds=[5]).weights)
    scaled = fit(pooled * np.float32(64.0), unsafe)
    np.testing.assert_allclose(scaled.weights, first.weights, rtol=1e-3, atol=1e-5)
    assert scaled.held_out_accuracy == first.held_out_accuracy


def test_constant_activations_give_no_scores() -> None:
    probe = fit(np.ones((B, F), dtype=np.float32), np.arange(B) < B // 2)
    assert np.isfinite(probe.weights).all()
    assert not z_scores(np.zeros(F)).any()


@pytest.mark.parametrize("paired", [False, True])
def test_what_is_held_out_was_not_fitted_and_pairs_stay_together(
    paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooled, unsafe = data()
    pooled[:, 0] = np.arange(B)  # a row's number, to know it again
    groups = np.concatenate([np.arange(B // 2)] * 2) if paired else None
    seen: list[tuple[set[int], set[int]]] = []
    real = sklearn.linear_model.LogisticRegression

    class Spy(real):  # type: ignore[misc, valid-type]
        def fit(self, x: Any, y: Any) -> Any:
            self.rows = x[:, 0]
            return super().fit(x, y)

        def score(self, x: Any, y: Any) -> Any:
            seen.append((set(self.rows.tolist()), set(x[:, 0].tolist())))
            return super().score(x, y)

    monkeypatch.setattr(sklearn.linear_model, "LogisticRegression", Spy)
    fit(pooled, unsafe, groups=groups)
    assert len(seen) == 3 and len({frozenset(test) for _, test in seen}) == 3
    scale = float(pooled.std())
    for fitted, test in seen:
        rows = [{round(value * scale) for value in part} for part in (fitted, test)]
        assert not rows[0] & rows[1]
        assert rows[0] | rows[1] == set(range(B))
        assert len(rows[1]) == round(0.2 * B)
        if paired:
            assert {row % (B // 2) for row in rows[0]}.isdisjoint(row % (B // 2) for row in rows[1])


def test_contrast_is_the_standardised_mean_difference() -> None:
    pooled, unsafe = data()
    pooled[:, 5] = 7.0  # a neuron that never changes
    first, second = pooled[unsafe].astype(float), pooled[~unsafe].astype(float)
    spread = np.sqrt((first.var(0) + second.var(0)) / 2)
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num((first.mean(0) - second.mean(0)) / spread)
    np.testing.assert_allclose(contrast(pooled, unsafe), expected, rtol=1e-10)
    assert contrast(pooled, unsafe)[5] == 0.0
    moving = np.arange(F) != 5
    # the same up to one factor
    t = scipy.stats.ttest_ind(first[:, moving], second[:, moving]).statistic
    ratio = t / contrast(pooled, unsafe)[moving]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)


def test_pairs_give_paired_differences_in_whatever_order() -> None:
    pooled, unsafe = data()
    topic = np.random.default_rng(9).normal(size=(B // 2, F)).astype(np.float32) * 20
    pooled += np.concatenate([topic, topic])  # what a pair has in common cancels
    groups = np.concatenate([np.arange(B // 2)] * 2)
    found = contrast(pooled, unsafe, groups)
    difference = pooled[: B // 2].astype(float) - pooled[B // 2 :]
    np.testing.assert_allclose(found, difference.mean(0) / difference.std(0), rtol=1e-10)
    assert set(np.argsort(found)[-2:]) == set(PLANTED)
    order = np.random.default_rng(1).permutation(B)
    shuffled = contrast(pooled[order], unsafe[order], groups[order])
    np.testing.assert_allclose(shuffled, found, rtol=1e-9)


def test_z_scores_are_scipys() -> None:
    weights = np.random.default_rng(0).normal(3.0, 5.0, size=1000)
    np.testing.assert_allclose(z_scores(weights), scipy.stats.zscore(weights), rtol=1e-10)
    assert not z_scores(np.full(7, 0.5)).any()


@pytest.mark.parametrize(("n_unsafe", "n_safe", "kind"), [(4, 9, "unsafe"), (9, 0, "safe")])
def test_too_few_of_a_kind_are_refused(n_unsafe: int, n_safe: int, kind: str) -> None:
    with pytest.raises(InputError, match=f"there are {min(n_unsafe, n_safe)} {kind} prompts"):
        check_labels(n_unsafe, n_safe)
    check_labels(5, 5)
    fit(*(values[[*range(5), *range(B - 5, B)]] for values in data()))
