"""Controls: of the selection's size at every site, and nothing of its choice."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from tiny_models import SAFE, UNSAFE, D, build, encoder_of

from nest.activations.capture import capture
from nest.models.layouts import find_sites
from nest.prompts.prompt_set import from_values
from nest.selection.config import Control, SelectionConfig
from nest.selection.controls import as_many, shuffled_labels
from nest.selection.probe import contrast, z_scores
from nest.selection.select import select_neurons
from nest.selection.selection import NeuronSelection


def select(control: Control | None, **settings: object) -> NeuronSelection:
    model = build()
    config = SelectionConfig(**{"z_threshold": 1.0, "n_probe_seeds": 1, **settings})  # type: ignore[arg-type]
    return select_neurons(
        model,
        encoder_of(model),
        unsafe=from_values(UNSAFE),
        safe=from_values(SAFE),
        sites=find_sites(model),
        config=config,
        control=control,
    )


@pytest.mark.parametrize("scope", ["projection", "layer"])
@pytest.mark.parametrize("control", get_args(Control))
def test_it_has_the_selections_size(control: Control, scope: str) -> None:
    true, found = select(None, cluster_scope=scope), select(control, cluster_scope=scope)
    sizes = [(part.site, part.neurons.numel(), part.group) for part in true.sites]
    assert sizes == [(part.site, part.neurons.numel(), part.group) for part in found.sites]
    for form in ("shared", "loaded"):
        assert found.trainable_parameters(form) == true.trainable_parameters(form)  # type: ignore[arg-type]
    same = [
        torch.equal(one.neurons, other.neurons)
        for one, other in zip(true.sites, found.sites, strict=True)
    ]
    assert all(same) == (control == "random_clusters")
    assert found.provenance["control"] == control.replace("_", " ")
    assert select(control, cluster_scope=scope).sha256() == found.sha256()


@pytest.mark.parametrize("side", ["positive", "both"])
def test_lowest_are_those_with_the_smallest_scores(side: str) -> None:
    model = build()
    found = select("lowest", scorer="contrast", side=side)
    activations = capture(model, encoder_of(model), [*UNSAFE, *SAFE], find_sites(model))
    labels = np.arange(len(UNSAFE) + len(SAFE)) < len(UNSAFE)
    for part in found.sites:
        index = activations.sites.index(part.site)
        z = z_scores(contrast(activations.pooled[index], labels))
        size = np.abs(z) if side == "both" else z
        others = np.delete(size, part.neurons.numpy())
        assert size[part.neurons.numpy()].max() <= others.min()
        np.testing.assert_allclose(part.scores.numpy(), z[part.neurons.numpy()], rtol=1e-5)


def test_labels_are_mixed_up_within_pairs() -> None:
    unsafe, groups = np.arange(40) < 20, np.concatenate([np.arange(20), np.arange(20)])
    mixed = shuffled_labels(unsafe, groups, seed=0)
    assert 0 < int((mixed != unsafe).sum()) < 40
    assert all(mixed[groups == pair].sum() == 1 for pair in range(20))
    free = shuffled_labels(unsafe, None, seed=0)
    assert free.sum() == 20 and not np.array_equal(free, unsafe)
    assert not np.array_equal(free, shuffled_labels(unsafe, None, seed=1))


def test_as_many_from_either_end() -> None:
    z = np.array([0.5, -3.0, 2.0, -0.1])
    assert as_many(z, 2, "highest", "positive").tolist() == [0, 2]
    assert as_many(z, 2, "lowest", "positive").tolist() == [1, 3]
    assert as_many(z, 2, "highest", "both").tolist() == [1, 2]
    assert as_many(z, 2, "lowest", "both").tolist() == [0, 3]


def test_separated_neurons_have_a_row_each() -> None:
    found = select(None, cluster_scope="layer")
    alone = found.separated()
    assert alone.n_clusters == alone.n_neurons == found.n_neurons
    assert alone.trainable_parameters("shared") == D * found.n_neurons
    assert all(part.clusters.unique().numel() == part.neurons.numel() for part in alone.sites)
