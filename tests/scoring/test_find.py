"""Scorers that learn from dialogues: what they score is what they say, whatever is asked of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    BENIGN,
    HARMFUL,
    SAFE,
    UNSAFE,
    build,
    encoder_of,
    layout_of,
    same_bits,
    state_of,
    word_tokenizer,
)
from torch import nn

import nest
from nest.activations.capture import capture
from nest.conversations.answers import target_logits
from nest.errors import InputError, SelectionError
from nest.models.layouts import find_sites
from nest.prompts.prompt_set import from_values
from nest.scoring.rankers import ByEffect, ByGradient
from nest.selection.config import LEARNING, SelectionConfig
from nest.selection.selection import NeuronSelection
from nest.tuning.config import TuningConfig
from nest.tuning.dialogues import MicroBatch, encode_dialogues

SETTINGS: dict[str, Any] = {"harmful": HARMFUL, "benign": BENIGN, "learning_epochs": 8.0}


def select(model: nn.Module, family: str = "qwen3", **changed: Any) -> NeuronSelection:
    arguments = {**SETTINGS, "warn": lambda _text: None, **changed}
    return nest.select(model, word_tokenizer(), layout=layout_of(family), **arguments)


def ranker(kind: type, model: nn.Module) -> Any:
    return kind(
        model,
        encoder_of(model),
        from_values(HARMFUL),
        from_values(BENIGN),
        SelectionConfig(scorer="effect"),
        TuningConfig(),
    )


@pytest.mark.parametrize("scorer", LEARNING)
@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "phi3"])
def test_a_budget_is_kept_to_the_neuron(scorer: str, family: str) -> None:
    model, side = build(family), "both" if scorer == "effect" else "positive"
    before = state_of(model)
    selection = select(model, family, scorer=scorer, neurons=7, side=side)
    assert selection.n_neurons == 7
    assert same_bits(before, state_of(model))
    again = select(build(family), family, scorer=scorer, neurons=7, side=side)
    assert again.sha256() == selection.sha256()
    assert selection.provenance["config"]["scorer"] == scorer
    assert set(selection.provenance["dialogues"]) == {"harmful", "benign"}
    total = sum(site.length for site in find_sites(model, layout_of(family)))
    share = select(model, family, scorer=scorer, neurons="10%", side=side)
    assert share.n_neurons == round(total / 10)


def test_the_effect_is_the_slope_of_the_refusals_loss() -> None:
    """Oracle: every activation of a neuron is moved by its difference, a little."""
    model = build().double()
    encoder, sites = encoder_of(model), find_sites(build())
    prompts = [*from_values(HARMFUL).conversations, *from_values(BENIGN).conversations]
    unsafe = np.arange(len(prompts)) < len(HARMFUL)
    activations = capture(model, encoder, prompts, sites)
    scored = ranker(ByEffect, model).rank(activations, unsafe).scored
    examples = encode_dialogues(encoder, from_values(HARMFUL), benign=False)
    n_targets = sum(example.n_targets for example in examples)
    batch = MicroBatch.of(examples, encoder.pad_id).batch

    def loss() -> float:
        with torch.no_grad():
            logits, targets, _ = target_logits(model, batch, torch.device("cpu"))
            return float(nn.functional.cross_entropy(logits, targets, reduction="sum")) / n_targets

    for one, pooled in zip(scored[:3], activations.pooled, strict=False):
        apart = pooled[unsafe].mean(0) - pooled[~unsafe].mean(0)
        for neuron in (1, 5):
            module = model.get_submodule(one.site.module)
            losses = []
            for sign in (1, -1):
                by = sign * 1e-2 * float(apart[neuron])

                def move(_m: Any, _i: Any, out: torch.Tensor, by: float = by) -> torch.Tensor:
                    out = out.clone()
                    out[..., neuron] += by  # noqa: B023 - used before the next one
                    return out

                handle = module.register_forward_hook(move)
                losses.append(loss())
                handle.remove()
            slope = (losses[0] - losses[1]) / 2e-2
            # the model's norms compute in fp32, and a step of a hundredth is not yet a slope
            assert one.weights[neuron] == pytest.approx(-slope, rel=5e-2, abs=3e-5)


def test_gradients_group_neurons_of_one_direction() -> None:
    model = build()
    encoder, sites = encoder_of(model), find_sites(model)
    prompts = [*from_values(HARMFUL).conversations, *from_values(BENIGN).conversations]
    unsafe = np.arange(len(prompts)) < len(HARMFUL)
    ranking = ranker(ByGradient, model).rank(capture(model, encoder, prompts, sites), unsafe)
    assert ranking.features is not None
    for one in ranking.scored:
        directions = ranking.features[one.site.name]
        assert np.allclose(np.linalg.norm(directions, axis=1), 1.0)
        assert (one.weights > 0).all()
    selection = select(model, scorer="gradient", neurons=24, max_clusters=3)
    assert any(part.n_clusters > 1 for part in selection.sites)
    for part in selection.sites:
        if part.n_clusters == 1:
            continue
        own = ranking.features[part.site.name][part.neurons.numpy()]
        alike = own @ own.T
        same = part.clusters[:, None].numpy() == part.clusters[None].numpy()
        assert alike[same].mean() > alike[~same].mean()


def test_learned_neurons_are_those_that_training_moved_most() -> None:
    model = build()
    selection = select(model, scorer="learned", neurons=12)
    assert all(part.n_clusters == 1 for part in selection.sites)
    assert selection.provenance["learned"]["steps"] > 0
    by_sign = select(model, scorer="learned", neurons=12, max_clusters=2)
    assert {p.site.name: p.neurons.tolist() for p in by_sign.sites} == {
        p.site.name: p.neurons.tolist() for p in selection.sites
    }
    assert by_sign.n_clusters > selection.n_clusters
    # trained from there they lower the loss more than as many at random
    losses = {}
    for name, control in (("learned", None), ("random", "random_neurons")):
        from nest.selection.controls import random_neurons

        chosen = selection if control is None else random_neurons(selection, seed=1)
        result = nest.tune_result(
            model,
            word_tokenizer(),
            chosen,
            harmful=HARMFUL,
            benign=BENIGN,
            check_refusals=False,
            batch_size=8,
            max_steps=12,
            validate_every=4,
            epochs=9.0,
            start="zero_loadings",
            validation=0.2,
            warn=lambda _text: None,
        )
        losses[name] = min(record.validation_loss for record in result.history)
    assert losses["learned"] < losses["random"]


@pytest.mark.parametrize("scorer", LEARNING)
def test_the_order_of_the_layout_plays_no_part(scorer: str) -> None:
    model = build()
    found = [
        nest.select(
            model,
            word_tokenizer(),
            layout=layout,
            scorer=scorer,
            neurons=9,
            warn=lambda _text: None,
            **SETTINGS,
        )
        for layout in (find_sites(model), find_sites(model)[::-1])
    ]
    assert found[0].sha256() == found[1].sha256()
    for one, other in zip(*(selection.sites for selection in found), strict=True):
        assert one.profiles is not None and other.profiles is not None
        assert torch.equal(one.profiles, other.profiles)


def test_what_is_missing_is_asked_for() -> None:
    model = build()
    for scorer in LEARNING:
        with pytest.raises(InputError, match=f"the scorer {scorer} learns from dialogues"):
            select(model, scorer=scorer, harmful=None, benign=None, unsafe=UNSAFE, safe=SAFE)
    with pytest.raises(InputError, match="the scorer probe learns from prompts alone"):
        select(model, unsafe=UNSAFE, safe=SAFE, scorer="probe")
    from_dialogues = select(model, scorer="contrast", z_threshold=0.5)
    prompts = {"unsafe": [p for p, _ in HARMFUL], "safe": [p for p, _ in BENIGN]}
    alone = select(model, scorer="contrast", z_threshold=0.5, harmful=None, benign=None, **prompts)
    assert from_dialogues.sha256() == alone.sha256()
    with pytest.raises(InputError, match=r"z_threshold is 2 and neurons 5; give one"):
        select(model, scorer="learned", neurons=5, z_threshold=2.0)
    for budget in ("0", "0%", "101%", "many", "-3"):
        with pytest.raises(InputError, match="neurons is"):
            select(model, scorer="learned", neurons=budget)
    for scorer in ("gradient", "learned"):
        with pytest.raises(InputError, match=f"the scorer {scorer} tells how much"):
            select(model, scorer=scorer, side="both")
    with pytest.raises(InputError, match="dialogues come in two kinds"):
        select(model, benign=None, unsafe=UNSAFE, safe=SAFE)
    with pytest.raises(InputError, match="comply"):
        select(model, harmful=[(prompt, "sure here you go") for prompt, _ in HARMFUL])
    with pytest.raises(SelectionError, match="no neuron has a z-score over 50"):
        select(model, scorer="gradient", z_threshold=50.0)


def test_a_budget_is_the_probes_too() -> None:
    model = build()
    chosen = nest.select(
        model, word_tokenizer(), unsafe=UNSAFE, safe=SAFE, neurons=9, warn=lambda _text: None
    )
    assert chosen.n_neurons == 9
    loose = nest.select(
        model, word_tokenizer(), unsafe=UNSAFE, safe=SAFE, z_threshold=-9.0, warn=lambda _t: None
    )
    best = sorted((float(s) for part in loose.sites for s in part.scores), reverse=True)[:9]
    found = sorted((float(s) for part in chosen.sites for s in part.scores), reverse=True)
    assert found == pytest.approx(best)
