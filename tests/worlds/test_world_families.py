"""Families: built to the recipe's sizes, run, and with neurons that the stages find."""

from __future__ import annotations

import pytest
import torch
from tiny_world import tiny_recipe

import nest
from nest.errors import InputError, LayoutError
from nest.models.layouts import find_sites
from nest.worlds.build import RECIPES
from nest.worlds.families import FAMILIES
from nest.worlds.recipe import build_model, build_tokenizer
from nest.worlds.sets import prompt_sets


def tiny_model(family: str):
    chosen = tiny_recipe(architecture=family, d_model=32, d_ff=48, n_layers=2, n_heads=4)
    tokenizer = build_tokenizer(chosen.world(), max_tokens=64)
    return chosen, build_model(chosen.training, tokenizer).eval(), tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_builds_and_runs(family):
    chosen, model, tokenizer = tiny_model(family)
    ids = tokenizer("Which way to the market?", return_tensors="pt").input_ids
    logits = model(ids).logits
    assert logits.shape == (1, ids.shape[1], len(tokenizer))
    assert torch.isfinite(logits).all()
    sites = find_sites(model, chosen.layout(model))
    assert {site.layer for site in sites} == {0, 1}
    assert {site.length for site in sites} == {48}
    assert len(sites) == (2 if family == "gpt_neox" else 4)
    assert (chosen.layout(model) is not None) == (family == "phi3")


def test_a_seed_gives_one_model_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    (_, first, _), (_, second, _) = tiny_model("llama"), tiny_model("llama")
    assert torch.equal(torch.get_rng_state(), before)
    for (key, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_builds_at_its_own_sizes(name):
    training = RECIPES[name].training
    tokenizer = build_tokenizer(RECIPES[name].world(), max_tokens=training.max_tokens)
    model = build_model(training, tokenizer)
    assert len({site.layer for site in find_sites(model, RECIPES[name].layout(model))}) == (
        training.n_layers
    )
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert n_parameters >= 8_000_000 if name == "citadel" else n_parameters < 2_000_000


def test_an_unknown_family_is_named():
    with pytest.raises(InputError, match="no family 'gpt5' of organisms; choose one of llama"):
        tiny_model("gpt5")


def test_fused_projections_are_selected_tuned_and_reverted():
    chosen, model, tokenizer = tiny_model("phi3")
    with pytest.raises(LayoutError):
        find_sites(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sets = {
        name: [(row.prompt, row.response) for row in rows[:32]]
        for name, rows in prompt_sets(chosen.world()).items()
    }
    selection = nest.select(
        model,
        tokenizer,
        unsafe=[prompt for prompt, _ in sets["unsafe"]],
        safe=[prompt for prompt, _ in sets["safe"]],
        layout=chosen.layout(model),
        z_threshold=1.0,
        warn=lambda _: None,
    )
    assert {site.site.projection for site in selection.sites} == {"gate_proj", "up_proj"}
    patch = nest.tune(
        model,
        tokenizer,
        selection,
        harmful=sets["harmful"],
        benign=sets["benign"],
        max_steps=4,
        learning_rate=0.1,
    )
    after = model.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed
    assert all(key.endswith("mlp.gate_up_proj.weight") for key in changed)
    patch.revert(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
