"""Planted neurons are selected; the options do what they say; refusals say what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    SAFE,
    UNSAFE,
    UNSAFE_WORDS,
    F,
    build,
    encoder_of,
    same_bits,
    state_of,
    word_tokenizer,
)
from torch import Tensor, nn

import nest
from nest.activations.capture import capture
from nest.errors import ActivationError, InputError, LayoutError, SelectionError
from nest.models.layouts import find_sites
from nest.selection.probe import contrast, z_scores
from nest.selection.select import reclustered
from nest.selection.selection import NeuronSelection

Z = 1.0


def select(model: nn.Module, **changed: Any) -> NeuronSelection:
    arguments = {"unsafe": UNSAFE, "safe": SAFE, "z_threshold": Z} | changed
    return nest.select(model, word_tokenizer(), warn=lambda _text: None, **arguments)


class Planted(nn.Module):
    """Two plain MLPs; neurons 5 and 11 of the first fire on unsafe words alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        vocabulary = word_tokenizer().get_vocab()
        self.embedding = nn.Embedding(len(vocabulary), 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"fc1": nn.Linear(8, F), "fc2": nn.Linear(F, 8)}) for _ in range(2)
        )
        with torch.no_grad():
            self.embedding.weight[:, 0] = 0.0
            for i, word in enumerate(UNSAFE_WORDS):
                self.embedding.weight[vocabulary[word], 0] = 1.0 + 0.1 * i
            fc1 = self.blocks[0]["fc1"]
            fc1.weight[:, 0] = 0.0
            fc1.weight[[5, 11]] = 0.0
            fc1.weight[[5, 11], 0] = 20.0

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = hidden + block["fc2"](block["fc1"](hidden).relu())
        return hidden


@pytest.mark.parametrize("scorer", ["probe", "contrast"])
@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("given", ["sets", "pairs"])
def test_planted_neurons_are_found(scorer: str, pool: str, given: str) -> None:
    prompts: dict[str, Any] = {}
    if given == "pairs":
        prompts = {"unsafe": None, "safe": None, "pairs": list(zip(UNSAFE, SAFE, strict=True))}
    selection = select(Planted(), scorer=scorer, pool=pool, **prompts)
    part = next(entry for entry in selection.sites if entry.site.name == "blocks.0.fc1")
    assert {5, 11} <= set(part.neurons.tolist())
    best = part.neurons[part.scores.topk(2).indices]
    assert set(best.tolist()) == {5, 11}
    # two neurons that fire alike stand in one cluster
    where = [part.neurons.tolist().index(neuron) for neuron in (5, 11)]
    assert part.clusters[where[0]] == part.clusters[where[1]]
    assert selection.provenance["paired"] == (given == "pairs")
    accuracy = selection.provenance["probe_accuracy"]
    assert accuracy == {"mean": None, "min": None} or accuracy["mean"] > 0.8
    assert (accuracy["mean"] is None) == (scorer == "contrast")


def test_a_neuron_is_kept_where_z_is_over_the_threshold_and_the_score_positive() -> None:
    model = build()
    selection = select(model, scorer="contrast", z_threshold=0.5)
    activations = capture(model, encoder_of(model), [*UNSAFE, *SAFE], find_sites(model))
    unsafe = np.arange(len(UNSAFE) + len(SAFE)) < len(UNSAFE)
    by_name = {part.site.name: part for part in selection.sites}
    for site, pooled in zip(activations.sites, activations.pooled, strict=True):
        scores = contrast(pooled, unsafe)
        z = z_scores(scores)
        expected = [i for i in range(F) if z[i] > 0.5 and scores[i] > 0]
        part = by_name[site.name]
        assert part.neurons.tolist() == expected
        np.testing.assert_allclose(part.scores.numpy(), z[expected], rtol=1e-4, atol=1e-4)
        assert part.profiles is not None
        np.testing.assert_allclose(
            part.profiles.numpy(), pooled[:, expected].T, rtol=1e-4, atol=1e-4
        )
    loose = select(model, scorer="contrast", z_threshold=-9.0)
    assert all((contrast_of > 0).all() for contrast_of in _scores(loose, activations, unsafe))


def _scores(selection: NeuronSelection, activations: Any, unsafe: np.ndarray) -> list[np.ndarray]:
    pooled = dict(zip((s.name for s in activations.sites), activations.pooled, strict=True))
    return [
        contrast(pooled[part.site.name], unsafe)[part.neurons.numpy()] for part in selection.sites
    ]


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_and_padding_change_no_neuron(family: str, batch_size: int) -> None:
    model = build(family)
    with torch.no_grad():  # leaking padding would drown everything
        model.get_input_embeddings().weight[0] = 30.0
    whole, small = (select(model, batch_size=size) for size in (48, batch_size))
    assert [p.site for p in whole.sites] == [p.site for p in small.sites]
    for first, second in zip(whole.sites, small.sites, strict=True):
        assert torch.equal(first.neurons, second.neurons)
        assert torch.equal(first.clusters, second.clusters)
        torch.testing.assert_close(first.scores, second.scores, rtol=1e-3, atol=1e-3)


def test_the_seed_decides_and_the_model_is_left_as_it_was() -> None:
    model = build()
    before = state_of(model)
    draws = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (select(model, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(draws[0], torch.random.get_rng_state())
    assert np.array_equal(draws[1], np.random.get_state()[1])
    assert same_bits(before, state_of(model))
    assert same_bits(first.tensors(), again.tensors())
    assert not same_bits(first.tensors(), other.tensors())


def test_clusters_per_projection_and_per_layer() -> None:
    model = build()
    each = select(model, z_threshold=0.5, cluster_scope="projection")
    assert [part.group for part in each.sites] == [part.site.name for part in each.sites]
    layer = select(model, z_threshold=0.5, cluster_scope="layer")
    assert [p.neurons.tolist() for p in each.sites] == [p.neurons.tolist() for p in layer.sites]
    rooms = {part.site.layer: part.group for part in layer.sites}
    assert len(set(rooms.values())) == len(rooms) == 2
    for part in layer.sites:
        assert part.group == rooms[part.site.layer] and part.n_clusters <= 2
    assert layer.trainable_parameters() == sum(k * d for k, d in layer.groups.values())
    assert len(layer.groups) == 2 and len(each.groups) == 4
    bounded = select(model, z_threshold=0.0, max_clusters=1)
    assert all(part.n_clusters == 1 for part in bounded.sites)


def test_profiles_are_an_even_sample() -> None:
    selection = select(build(), max_profile_prompts=6)
    whole = select(build())
    for part, full in zip(selection.sites, whole.sites, strict=True):
        assert part.profiles is not None and full.profiles is not None
        columns = np.linspace(0, len(UNSAFE) + len(SAFE) - 1, 6).astype(int)
        torch.testing.assert_close(part.profiles, full.profiles[:, columns])
        assert sum(columns < len(UNSAFE)) == 3


def test_spilt_activations_give_the_same_selection() -> None:
    inside, spilt = (select(build(), memory_bound_bytes=bound) for bound in (2**30, 0))
    assert same_bits(inside.tensors(), spilt.tensors())


def test_sites_without_neurons_are_skipped_and_told() -> None:
    told: list[str] = []
    model = build()
    selection = nest.select(
        model, word_tokenizer(), unsafe=UNSAFE, safe=SAFE, z_threshold=1.9, warn=told.append
    )
    skipped = selection.provenance["skipped_sites"]
    assert len(selection.sites) + len(skipped) == 4 and skipped
    assert len(told) == 1 and f"{len(skipped)} sites have no neuron over z 1.9" in told[0]
    assert all(name in told[0] for name in skipped)
    with pytest.warns(UserWarning, match="have no neuron over z"):
        nest.select(model, word_tokenizer(), unsafe=UNSAFE, safe=SAFE, z_threshold=1.9)


def test_what_was_done_is_on_record() -> None:
    selection = select(build(), seed=2)
    record = selection.provenance
    assert record["config"]["seed"] == 2 and record["config"]["z_threshold"] == Z
    assert record["prompts"]["unsafe"]["n"] == len(UNSAFE)
    assert len(record["tokenizer_hash"]) == 64 and record["parameters"] > 0
    assert {"python", "torch", "transformers"} <= set(record["versions"])
    assert set(record["probe_accuracy_by_site"]) == {s.name for s in find_sites(build())}


@pytest.mark.parametrize("wanted", [1, 2, 100, None])
def test_neurons_can_be_clustered_anew(wanted: int | None) -> None:
    selection = select(build(), z_threshold=0.3, cluster_scope="layer")
    found = reclustered(selection, wanted)
    for part, before in zip(found.sites, selection.sites, strict=True):
        assert torch.equal(part.neurons, before.neurons)
        assert part.group == part.site.name
        if wanted is not None:
            assert part.n_clusters == min(wanted, part.neurons.numel())
    assert found.provenance["reclustered"] == (wanted or "auto")
    again = select(build(), z_threshold=0.3, max_clusters=None)
    if wanted is None:  # all prompts are in the profiles here, so this is what select does
        assert [p.clusters.tolist() for p in found.sites] == [
            p.clusters.tolist() for p in again.sites
        ]


def test_clustering_anew_needs_profiles_and_a_number() -> None:
    selection = select(build())
    with pytest.raises(InputError, match="n_clusters is 0"):
        reclustered(selection, 0)
    by_hand = NeuronSelection.of(build(), {"model.layers.0.mlp.gate_proj": ([1], [0])})
    with pytest.raises(SelectionError, match="no activation profiles"):
        reclustered(by_hand, 1)


def test_bad_input_has_its_sentence() -> None:
    model = build()
    for changed, kind, said in (
        (
            {"z_threshold": 50.0},
            SelectionError,
            r"no neuron has a z-score over 50; the largest found is \d",
        ),
        ({"safe": None}, InputError, "needs unsafe and safe prompts"),
        ({"safe": SAFE[:4]}, InputError, "there are 4 safe prompts; give at least 5"),
        ({"pairs": [("a", "b")]}, InputError, "not both"),
        ({"unsafe": []}, InputError, "unsafe is empty"),
        ({"unsafe": ["how", " "] * 5}, InputError, "item 2: prompt is empty"),
        ({"unsafe": ["how " * 60] * 6}, InputError, r"\d+ tokens, but the model's context is 48"),
        ({"seed": -1}, InputError, "seed is -1"),
        (
            {"z_threshold": float("nan"), "max_clusters": 0},
            InputError,
            r"z_threshold.*; max_clusters",
        ),
        ({"z": 3.0}, InputError, "no such setting: z; there are z_threshold"),
        ({"batch_size": 0}, InputError, "batch_size is 0"),
    ):
        with pytest.raises(kind, match=said):
            select(model, **changed)
    with pytest.raises(LayoutError, match="no MLP was found"):
        select(nn.Embedding(9, 3))
    with pytest.raises(InputError, match="give a tokenizer"):
        nest.select(model, unsafe=UNSAFE, safe=SAFE)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[2, 2] = float("nan")
    with pytest.raises(ActivationError, match=r"model\.layers\.0\.mlp\.up_proj"):
        select(model)


def test_the_largest_z_is_named_truly() -> None:
    model = build()
    with pytest.raises(SelectionError) as raised:
        select(model, z_threshold=50.0)
    words = str(raised.value).split()
    largest, name = float(words[words.index("is") + 1]), words[words.index("at") + 1].rstrip(":")
    found = select(model, z_threshold=largest - 0.02)
    assert [part.site.name for part in found.sites] == [name]


# --- prompts that do not tell the sides apart ---------------------------------------------------------


def test_the_same_prompts_on_both_sides_are_refused() -> None:
    model = build()
    with pytest.raises(InputError, match="24 prompts are both in unsafe"):
        nest.select(model, word_tokenizer(), unsafe=UNSAFE, safe=UNSAFE, z_threshold=1.0)
    told: list[str] = []
    safe = [*SAFE, UNSAFE[0]]
    nest.select(
        model, word_tokenizer(), unsafe=UNSAFE, safe=safe, z_threshold=1.0, warn=told.append
    )
    assert any("1 prompts are both" in said for said in told)


def test_probes_that_are_no_better_than_chance_are_refused() -> None:
    mixed = [prompt for pair in zip(UNSAFE, SAFE, strict=True) for prompt in pair]
    # every prompt under either label, a filler apart: nothing tells the labels from one another
    unsafe, safe = mixed, [f"{prompt} now" for prompt in mixed]
    told: list[str] = []
    model = build()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
    with pytest.raises((InputError, SelectionError)) as refused:
        nest.select(
            model, word_tokenizer(), unsafe=unsafe, safe=safe, z_threshold=1.0, warn=told.append
        )
    assert "no probe tells unsafe from safe" in str(refused.value)
