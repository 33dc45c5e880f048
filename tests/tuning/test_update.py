"""An update lives in the selected rows alone, and the model is bit for bit itself afterwards."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from tiny_models import (
    D,
    F,
    build,
    choose,
    filled,
    layer_wide,
    loss_of,
    quantised,
    same_bits,
    state_of,
    tokens,
)
from torch import nn

from nest.errors import InputError, LayoutError, SelectionError
from nest.models.binding import bind
from nest.selection.config import UpdateForm
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.update import trainable
from nest_kernels.neuron_adamw import updated_rows

FORMS: tuple[UpdateForm, ...] = ("shared", "loaded")
FAMILIES = ("qwen3", "gpt_neox", "phi3", "gpt2")
# The model and the oracles run in fp64; the update's own buffers and thin products are fp32, with some
# forty tokens summed: 40 * 2**-24, relative to the largest entry.
RELATIVE = 5e-6


# --- the packed buffer ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", ["projection", "layer"])
def test_the_views_are_an_exact_partition(form: UpdateForm, scope: str) -> None:
    model = build()
    selection = choose(model) if scope == "projection" else layer_wide(model)
    with trainable(model, selection, update=form) as update:
        n = update.packed.numel()
        assert n == selection.trainable_parameters(form)
        numbers = torch.arange(n, dtype=torch.float32)
        with torch.no_grad():
            update.packed.copy_(numbers)
        views = {site.part.group: site.vectors for site in update.sites}
        views |= {f"s {s.part.site.name}": s.loadings for s in update.sites if form == "loaded"}
        seen = torch.cat([view.detach().flatten() for view in views.values()])
        assert torch.equal(seen.sort().values, numbers)
        vectors = [views[group].detach().flatten() for group in selection.groups]
        assert torch.cat(vectors).max() == update.n_vector_parameters - 1
        # each part's gradient arrives where the part stands
        update.load_snapshot([torch.zeros(n)])
        (
            sum((view * numbers[: view.numel()].view(view.shape)).sum() for view in views.values())
        ).backward()
        for name, view in views.items():
            kept = update.gradients() | {f"s {k}": v for k, v in update.loading_gradients().items()}
            assert torch.equal(kept[name], numbers[: view.numel()].view(view.shape))


def test_the_start() -> None:
    model = build()
    selection = choose(model)
    with trainable(model, selection, update="shared") as update:
        assert not update.packed.any()
    starts = {}
    for start in ("zero_vectors", "zero_loadings", None):
        found = []
        for seed in (0, 0, 1):
            with trainable(model, selection, update="loaded", seed=seed, start=start) as update:
                vectors, loadings = (
                    update.packed.detach()
                    .clone()
                    .split([update.n_vector_parameters, selection.n_neurons])
                )
            found.append((vectors, loadings))
        drawn = [loadings if start == "zero_vectors" else vectors for vectors, loadings in found]
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
        starts[start] = found[0]
    vectors, loadings = starts["zero_vectors"]
    assert not vectors.any()
    assert float((loadings - 1).abs().max()) < 0.1 and float(loadings.std()) > 0
    vectors, loadings = starts["zero_loadings"]
    assert not loadings.any()
    lengths = vectors.view(selection.n_clusters, -1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    assert all(torch.equal(a, b) for a, b in zip(starts[None], (vectors, loadings), strict=True))
    wrong: dict[str, Any]
    for wrong in ({"update": "shared", "start": "zero_loadings"}, {"start": "warm"}):
        # jaxtyping's hook sees the second first
        with (
            pytest.raises((InputError, TypeError), match="start"),
            trainable(model, selection, **wrong),
        ):
            pass


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
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained == ["nest_update.packed"]
        assert model.dtype == dtype  # the first parameter is still the model's own
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
    assert set(model.__dict__) == keys and not hasattr(model, "nest_update")
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
        assert update.packed.grad is None


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


def test_quantised_weights_train_as_a_branch_and_the_patch_is_the_plain_models() -> None:
    plain, packed = build(), quantised(build())
    selection = choose(plain)
    with (
        pytest.raises(SelectionError, match=r"torch\.uint8: its rows.*mode='branch'"),
        trainable(packed, selection),
    ):
        pass
    before = state_of(packed)
    patches = []
    for model, mode in ((plain, "live"), (packed, "branch")):
        with trainable(model, selection, mode=mode) as update:
            optimizer = NeuronAdamW(update, lr=0.05)
            for seed in range(3):
                loss_of(model, tokens(seed=seed)).backward()
                optimizer.step()
                optimizer.zero_grad()
            if mode == "branch":
                assert same_bits(before, state_of(model))
                with pytest.raises(SelectionError, match=r"update\.patch\(base="):
                    update.patch()
                patches.append(update.patch(base=build()))
            else:
                patches.append(update.patch())
    for group, vectors in patches[0].vectors.items():
        # fp32 sums in another order; Adam divides small gradients by small roots for three steps
        torch.testing.assert_close(patches[1].vectors[group], vectors, rtol=1e-3, atol=1e-4)
    patches[1].fold_into(plain)


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
        with (  # nor through a part of it
            pytest.raises(InputError, match="has a trainable update already"),
            trainable(nn.ModuleDict({"model": model.model}), selection),
        ):
            pass
        assert hasattr(model, "nest_update")  # the outer block still holds it
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
        bind(model, selection.sites[0].site).weight[0, 0] += 1  # a row that is not even selected
    with pytest.raises(SelectionError, match="weights changed"), trainable(model, selection):
        pass
    with torch.no_grad():
        bind(model, selection.sites[0].site).weight.copy_(before[selection.sites[0].site.parameter])
    assert same_bits(before, state_of(model))


@pytest.mark.parametrize("how", ["moved", "replaced", "cast"])
def test_weights_that_are_no_longer_the_prepared_ones_stop_the_step(how: str) -> None:
    model = build()
    with trainable(model, choose(model)) as update:
        optimizer = NeuronAdamW(update)
        loss_of(model, tokens()).backward()
        layer = model.model.layers[1].mlp.up_proj
        held = layer.weight.data
        if how == "replaced":
            layer.weight = nn.Parameter(held.clone())
        elif how == "moved":
            layer.weight.data = held.clone()
        else:
            layer.weight.data = held.bfloat16()
        before = update.packed.detach().clone()
        with pytest.raises(SelectionError, match=r"layers\.1\.mlp\.up_proj.*replaced or moved"):
            optimizer.step()
        assert torch.equal(before, update.packed)
        filled(update)
    # what stands in the model now has its own rows back
    now, start = layer.weight.detach(), build().model.layers[1].mlp.up_proj.weight
    assert torch.equal(now, start.to(now.dtype))


def test_an_update_in_fp64_gives_no_patch() -> None:
    model = build()
    with (
        trainable(model, choose(model), dtype=torch.float64) as update,
        pytest.raises(InputError, match="a patch holds fp32"),
    ):
        update.patch()
    with (
        pytest.raises(InputError, match="float32 or float64"),
        trainable(model, choose(model), dtype=torch.bfloat16),
    ):
        pass
    with (
        pytest.raises((InputError, TypeError), match="branch"),
        trainable(model, choose(model), mode="dead"),
    ):
        pass


def test_after_the_block_nothing_is_written() -> None:
    model = build()
    before = state_of(model)
    with trainable(model, choose(model)) as update:
        optimizer = NeuronAdamW(update, lr=0.1)
        loss_of(model, tokens()).backward()
        optimizer.step()
        live = state_of(model)
    late = update.patch()
    assert same_bits(before, state_of(model))
    with pytest.raises(InputError, match=r"block of nest\.trainable has ended"):
        optimizer.step()
    update.load_snapshot(update.snapshot())
    with update.removed():
        pass
    assert same_bits(before, state_of(model))
    late.fold_into(model)
    assert same_bits(live, state_of(model))


def test_removed_blocks_may_stand_inside_one_another() -> None:
    model = build()
    before = state_of(model)
    with trainable(model, choose(model)) as update:
        filled(update)
        live = state_of(model)
        with update.removed():
            update.patch()
            update.load_snapshot(update.snapshot())
            assert same_bits(before, state_of(model))
        assert same_bits(live, state_of(model))


@pytest.mark.parametrize("mode", ["live", "branch"])
def test_a_copy_of_the_model_does_not_follow_the_training(mode: str) -> None:
    model = build()
    with trainable(model, choose(model), mode=mode) as update:
        twin = copy.deepcopy(model)
        if mode == "branch":
            with pytest.raises(InputError, match="copies of the model outside"):
                twin(tokens())
            return
        filled(update)
        assert not loss_of(twin, tokens()).requires_grad


def test_weights_tied_to_other_modules_are_refused_in_live_mode() -> None:
    model = build()
    selection = choose(model)
    model.extra = nn.Linear(D, F, bias=False)
    model.extra.weight = model.model.layers[0].mlp.up_proj.weight
    with (
        pytest.raises(SelectionError, match=r"is tied to extra\.weight"),
        trainable(model, selection),
    ):
        pass
    with trainable(model, selection, mode="branch"):
        pass


def test_a_replaced_module_stops_the_step() -> None:
    model = build()
    with trainable(model, choose(model)) as update:
        optimizer = NeuronAdamW(update)
        loss_of(model, tokens()).backward()
        mlp = model.model.layers[0].mlp
        held, mlp.gate_proj = mlp.gate_proj, nn.Linear(D, F, bias=False)
        with pytest.raises(SelectionError, match=r"gate_proj was replaced"):
            optimizer.step()
        mlp.gate_proj = held
        update.packed.data = update.packed.data.clone()
        with pytest.raises(SelectionError, match="moved to other memory"):
            optimizer.step()


def test_a_block_that_cannot_restore_still_frees_the_model() -> None:
    model = build()
    selection = choose(model)
    weight = model.model.layers[0].mlp.gate_proj.weight
    with pytest.raises((AttributeError, TypeError)), trainable(model, selection):
        model.model.layers[0].mlp.gate_proj.weight = None
    assert not hasattr(model, "nest_update") and all(p.requires_grad for p in model.parameters())
    model.model.layers[0].mlp.gate_proj.weight = weight
    with trainable(model, selection):
        pass


@pytest.mark.parametrize(("value", "said"), [("foo", "choose auto"), ("triton", "CUDA GPU")])
def test_kernels_that_cannot_run_are_refused(
    value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    monkeypatch.setenv("NEST_KERNELS", value)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError, match=said), trainable(model, choose(model)):
        pass


def test_calls_we_cannot_hook_say_so() -> None:
    model = build()
    with (
        trainable(model, choose(model)),
        pytest.raises(LayoutError, match="without positional arguments"),
    ):
        model.model.layers[0].mlp.gate_proj(input=torch.zeros(1, D))
