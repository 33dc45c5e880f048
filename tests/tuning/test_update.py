"""The update's gradients are those of two oracles, and the model is untouched but for its rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import D, F, build, choose, same_bits, state_of
from torch import Tensor, nn
from torch.func import functional_call

from nest.errors import InputError, LayoutError, SelectionError
from nest.models.fingerprint import fingerprint
from nest.models.layouts import find_sites
from nest.models.sites import site_weight
from nest.selection.config import UpdateForm
from nest.selection.selection import NeuronSelection, SiteSelection
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.update import ClusterUpdate, trainable
from nest_kernels.neuron_adamw import updated_rows

FORMS: tuple[UpdateForm, ...] = ("shared", "loaded")
FAMILIES = ("qwen3", "gpt_neox", "phi3", "gpt2")
# The model and the oracles run in fp64; the update's own buffers and thin products are fp32, with some
# forty tokens summed: 40 * 2**-24, relative to the largest entry.
RELATIVE = 5e-6


def tokens(n_rows: int = 3, length: int = 7, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(7, 30, (n_rows, length), generator=draw)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def close(found: Tensor, expected: Tensor) -> None:
    bound = RELATIVE * max(float(expected.abs().max()), 1e-12)
    torch.testing.assert_close(found.double(), expected.double(), rtol=0.0, atol=bound)


def filled(update: ClusterUpdate, seed: int = 0) -> None:
    """An update away from its start, so that the gradients' dependence on U and s is seen."""
    draw = torch.Generator().manual_seed(seed)
    noise = 0.1 * torch.randn(update.packed.numel(), generator=draw)
    update.load_snapshot([update.packed.detach() + noise])


def dense_gradients(
    twin: nn.Module,
    update: ClusterUpdate,
    loss: Callable[[Callable[[Tensor], Tensor]], Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Oracle (a): autograd through W0 + diag(s) M U, dense, on an untouched copy."""
    vectors: dict[str, Tensor] = {}
    loadings: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for site in update.sites:
        part = site.part
        u = vectors.setdefault(part.group, site.vectors.detach().double().requires_grad_())
        delta = u[part.clusters]
        if site.loadings is not None:
            loadings[part.site.name] = site.loadings.detach().double().requires_grad_()
            delta = loadings[part.site.name][:, None] * delta
        name = part.site.parameter
        weight = weights.get(name, twin.state_dict()[name])
        index = part.neurons + part.site.offset
        values = delta if part.site.axis == 0 else delta.T
        weights[name] = weight.index_add(part.site.axis, index, values)

    def run(ids: Tensor) -> Tensor:
        kwargs = {"input_ids": ids, "labels": ids, "use_cache": False}
        found: Tensor = functional_call(twin, weights, kwargs=kwargs).loss
        return found

    loss(run).backward()

    def gradients(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    return gradients(vectors), gradients(loadings)


def loading_gradients(update: ClusterUpdate) -> dict[str, Tensor]:
    return {
        site.part.site.name: site.loadings.grad
        for site in update.sites
        if site.loadings is not None and site.loadings.grad is not None
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at_start", [True, False])
def test_gradients_are_autograds_through_dense_weights(
    family: str, form: UpdateForm, at_start: bool
) -> None:
    model = build(family).double()  # fp32 numbers in fp64: W0 + s U is then exact to fp32
    twin = copy.deepcopy(model)
    selection = choose(model, family)
    with trainable(model, selection, update=form) as update:
        if not at_start:
            filled(update)
        ids = tokens()
        expected, expected_loadings = dense_gradients(twin, update, lambda run: run(ids))
        loss_of(model, ids).backward()
        found = update.gradients()
        assert found.keys() == expected.keys()
        for group, gradient in expected.items():
            assert float(gradient.abs().max()) > 0
            close(found[group], gradient)
        for name, gradient in expected_loadings.items():
            close(loading_gradients(update)[name], gradient)
        assert len(expected_loadings) == (len(selection.sites) if form == "loaded" else 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])
def test_gradients_are_those_of_a_lora_whose_b_is_the_membership(
    family: str, form: UpdateForm
) -> None:
    model = build(family).double()
    twin = copy.deepcopy(model)
    selection = choose(model, family, clusters=(0, 1, 1, 1))
    rank = 2
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # a scale of one
        lora_dropout=0.0,
        target_modules=[part.site.module for part in selection.sites],
    )
    lora = get_peft_model(twin, config).double()
    with trainable(model, selection, update=form) as update:
        filled(update)
        layers = {}
        for site in update.sites:
            layer = twin.get_submodule(site.part.site.module)
            layers[site.part.site.name] = layer
            membership = torch.zeros(F, rank, dtype=torch.float64)
            scale = torch.ones(4) if site.loadings is None else site.loadings.detach()
            membership[site.part.neurons, site.part.clusters] = scale.double()
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            with torch.no_grad():
                a.copy_(site.vectors.detach())
                b.copy_(membership)
            b.requires_grad_(form == "loaded")  # else frozen to M, as the paper's identity says
        for seed in (0, 1):  # two batches: gradients accumulate
            ids = tokens(seed=seed)
            loss_of(lora, ids).backward()
            loss_of(model, ids).backward()
        for site in update.sites:
            layer = layers[site.part.site.name]
            close(update.gradients()[site.part.group], layer.lora_A["default"].weight.grad)
            if form == "loaded":
                gradient = layer.lora_B["default"].weight.grad
                wanted = gradient[site.part.neurons, site.part.clusters]
                close(loading_gradients(update)[site.part.site.name], wanted)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_accumulate_until_they_are_cleared(form: UpdateForm) -> None:
    model = build().double()
    twin = copy.deepcopy(model)
    selection = choose(model)
    batches = [tokens(seed=0), tokens(n_rows=1, length=5, seed=1)]
    with trainable(model, selection, update=form) as update:
        filled(update)
        expected, _ = dense_gradients(twin, update, lambda run: run(batches[0]) + run(batches[1]))
        for ids in batches:
            loss_of(model, ids).backward()
        for group, gradient in expected.items():
            close(update.gradients()[group], gradient)
        NeuronAdamW(update).zero_grad()
        assert not update.packed.grad.any() and not any(
            gradient.any() for gradient in update.gradients().values()
        )
        loss_of(model, batches[1]).backward()
        expected, _ = dense_gradients(twin, update, lambda run: run(batches[1]))
        for group, gradient in expected.items():
            close(update.gradients()[group], gradient)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])
def test_gradient_checkpointing_changes_nothing(family: str, form: UpdateForm) -> None:
    model = build(family)
    model.train()  # transformers checkpoints in training mode only; these configs have no dropout
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            # transformers renamed it within its fifth version
            name = "activation_checkpointing_enable"
            enable = getattr(model, name, None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        with trainable(model, choose(model, family), update=form) as update:
            filled(update)
            loss_of(model, tokens()).backward()
            found.append(update.packed.grad.clone())
    assert float(found[0].abs().max()) > 0
    assert torch.equal(found[0], found[1])


def layer_wide(model: nn.Module) -> NeuronSelection:
    """The sites of a layer share two vectors, as `--cluster-scope layer` has it."""
    parts = [
        SiteSelection(
            site=site,
            neurons=torch.tensor([i, 6 + i, 11]),
            scores=torch.zeros(3),
            clusters=torch.tensor([0, 1, i % 2]),
            width=D,
            group=f"layer {site.layer}",
            n_clusters=2,
        )
        for i, site in enumerate(find_sites(model))
    ]
    return NeuronSelection(tuple(parts), fingerprint(model, [part.site for part in parts]))


@pytest.mark.parametrize("form", FORMS)
def test_a_vector_shared_by_sites_gets_their_summed_gradient(form: UpdateForm) -> None:
    model = build().double()
    twin = copy.deepcopy(model)
    selection = layer_wide(model)
    with trainable(model, selection, update=form) as update:
        filled(update)
        ids = tokens()
        expected, _ = dense_gradients(twin, update, lambda run: run(ids))
        loss_of(model, ids).backward()
        assert list(expected) == ["layer 0", "layer 1"]
        assert update.n_vector_parameters == 2 * 2 * D
        for group, gradient in expected.items():
            close(update.gradients()[group], gradient)


# --- the packed buffer ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", ["projection", "layer"])
def test_the_views_are_an_exact_partition(form: UpdateForm, scope: str) -> None:
    model = build()
    selection = choose(model) if scope == "projection" else layer_wide(model)
    with trainable(model, selection, update=form) as update:
        n = update.packed.numel()
        assert n == selection.trainable_parameters(form)
        with torch.no_grad():
            update.packed.copy_(torch.arange(n))
            update.packed.grad.copy_(torch.arange(n))
        views = {site.part.group: site.vectors for site in update.sites}
        leaves = [*views.values(), *(s.loadings for s in update.sites if s.loadings is not None)]
        for of in (lambda leaf: leaf.detach(), lambda leaf: leaf.grad):
            seen = torch.cat([of(leaf).flatten() for leaf in leaves])
            assert torch.equal(seen.sort().values, torch.arange(n, dtype=torch.float32))
        vectors = torch.cat([leaf.detach().flatten() for leaf in views.values()])
        assert vectors.numel() == update.n_vector_parameters
        assert int(vectors.max()) == update.n_vector_parameters - 1
        update.load_snapshot([torch.zeros(n)])


def test_the_start() -> None:
    model = build()
    selection = choose(model)
    with trainable(model, selection, update="shared") as update:
        assert not update.packed.any()
    starts = []
    for seed in (0, 0, 1):
        with trainable(model, selection, update="loaded", seed=seed) as update:
            assert not update.packed[: update.n_vector_parameters].any()
            starts.append(update.packed[update.n_vector_parameters :].detach().clone())
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    assert float((starts[0] - 1).abs().max()) < 0.1 and float(starts[0].std()) > 0


# --- the model ------------------------------------------------------------------------------------


class _StopError(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_bit_identical_afterwards(
    family: str, form: UpdateForm, raises: bool, dtype: torch.dtype
) -> None:
    model = build(family, dtype)
    model.train()
    first = next(model.parameters())
    first.requires_grad_(False)
    before, flags = state_of(model), [p.requires_grad for p in model.parameters()]
    keys = set(model.__dict__)
    with suppress(_StopError), trainable(model, choose(model, family), update=form) as update:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        optimizer = NeuronAdamW(update, lr=0.1)
        for _ in range(2):
            loss_of(model, tokens()).backward()
            optimizer.step()
        assert not same_bits(before, state_of(model))
        if raises:
            raise _StopError
    assert same_bits(before, state_of(model))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())
    assert set(model.__dict__) == keys
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_change_the_selected_rows_alone_and_as_said(
    family: str, form: UpdateForm, dtype: torch.dtype
) -> None:
    model = build(family, dtype)
    before = state_of(model)
    selection = choose(model, family)
    with trainable(model, selection, update=form) as update:
        optimizer = NeuronAdamW(update, lr=0.05, weight_decay=0.1)
        for seed in range(3):
            loss_of(model, tokens(seed=seed)).backward()
            optimizer.step()
            optimizer.zero_grad()
        expected = {name: value.clone() for name, value in before.items()}
        for site in update.sites:
            part = site.part
            weight = expected[part.site.parameter]
            weight = weight if part.site.axis == 0 else weight.T
            for j, neuron in enumerate((part.neurons + part.site.offset).tolist()):
                own = None if site.loadings is None else site.loadings.detach()[j : j + 1]
                cluster = part.clusters[j : j + 1]
                row = weight[neuron : neuron + 1].clone()
                weight[neuron] = updated_rows(row, site.vectors.detach(), cluster, own)[0]
        assert same_bits(expected, state_of(model))
        changed = {name for name, value in before.items() if not value.equal(expected[name])}
        assert changed == {part.site.parameter for part in selection.sites}


def test_outside_training_nothing_is_attached() -> None:
    model = build()
    with trainable(model, choose(model)) as update:
        with torch.no_grad():
            assert not model(tokens()).logits.requires_grad
        with torch.inference_mode():
            model(tokens())
        assert model(tokens()).logits.requires_grad
        assert not update.packed.grad.any()


def test_the_base_model_can_be_had_for_a_while() -> None:
    model = build()
    before = state_of(model)
    with trainable(model, choose(model)) as update:
        filled(update)
        tuned = state_of(model)
        with suppress(_StopError), update.removed():
            assert same_bits(before, state_of(model))
            raise _StopError
        assert same_bits(tuned, state_of(model))
        values = update.snapshot()
        update.load_snapshot([torch.zeros_like(update.packed)])
        assert same_bits(before, state_of(model))
        update.load_snapshot(values)
        assert same_bits(tuned, state_of(model))


@pytest.mark.parametrize("form", FORMS)
def test_its_patch_folds_to_the_very_bits_that_were_trained(form: UpdateForm) -> None:
    model = build()
    before = state_of(model)
    with trainable(model, choose(model), update=form) as update:
        filled(update)
        live = state_of(model)
        patch = update.patch({"note": "kept"})
        assert same_bits(live, state_of(model))
        assert patch.update == form and patch.provenance["note"] == "kept"
        held = {group: vectors.clone() for group, vectors in patch.vectors.items()}
        filled(update, seed=1)
        assert all(patch.vectors[group].equal(values) for group, values in held.items())
    patch.fold_into(model)
    assert same_bits(live, state_of(model))
    patch.revert(model)
    assert same_bits(before, state_of(model))


# --- refusals -------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused_and_left_alone() -> None:
    model = build()
    selection = choose(model)
    before = state_of(model)
    with (
        pytest.raises((InputError, TypeError), match="shared"),
        trainable(model, selection, update="x"),
    ):
        pass
    with trainable(model, selection):
        with (
            pytest.raises(InputError, match="has a trainable update already"),
            trainable(model, selection),
        ):
            pass
        assert hasattr(model, "_nest_update")  # the outer block still holds it
    with (
        pytest.raises(SelectionError, match="another model"),
        trainable(build(seed=1), selection),
    ):
        pass
    with (
        pytest.raises((SelectionError, LayoutError), match="no module"),
        trainable(build("gpt_neox"), selection),
    ):
        pass
    with (
        pytest.raises(SelectionError, match="meta device"),
        trainable(copy.deepcopy(model).to("meta"), selection),
    ):
        pass
    with torch.no_grad():
        site_weight(model, selection.sites[0].site)[0, 0] += 1  # a row that is not even selected
    with pytest.raises(SelectionError, match="weights changed"), trainable(model, selection):
        pass
    with torch.no_grad():
        site_weight(model, selection.sites[0].site).copy_(before[selection.sites[0].site.parameter])
    assert same_bits(before, state_of(model))
