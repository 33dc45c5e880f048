"""Gradients of an update are those of two oracles, in both modes, however the pass is cut up."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import F, build, choose, filled, layer_wide, loss_of, tokens
from torch import Tensor, nn
from torch.func import functional_call

from nest.models.blocks import blocks_of, checkpointed
from nest.selection.config import UpdateForm
from nest.tuning.config import UpdateMode
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.update import ClusterUpdate, trainable

FORMS: tuple[UpdateForm, ...] = ("shared", "loaded")
MODES: tuple[UpdateMode, ...] = ("live", "branch")
FAMILIES = ("qwen3", "gpt_neox", "phi3", "gpt2")
# Everything runs in fp64; a few dozen products are summed in another order.
RELATIVE = 1e-9


def close(found: Tensor, expected: Tensor) -> None:
    bound = RELATIVE * max(float(expected.abs().max()), 1e-12)
    torch.testing.assert_close(found.double(), expected.double(), rtol=0.0, atol=bound)


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at_start", [True, False])
def test_gradients_are_autograds_through_dense_weights(
    family: str, form: UpdateForm, at_start: bool, mode: UpdateMode
) -> None:
    model = build(family).double()
    twin = copy.deepcopy(model)
    selection = choose(model, family)
    with trainable(model, selection, update=form, mode=mode, dtype=torch.float64) as update:
        if not at_start:
            filled(update)
        ids = tokens()
        expected, expected_loadings = dense_gradients(twin, update, lambda run: run(ids))
        loss_of(model, ids).backward()
        found = update.gradients()
        assert found.keys() == expected.keys()
        for group, gradient in expected.items():
            # loadings of zero: at the start the vectors have no gradient, and the loadings have one
            assert bool(gradient.abs().max() > 0) == (form == "shared" or not at_start)
            close(found[group], gradient)
        for name, gradient in expected_loadings.items():
            assert float(gradient.abs().max()) > 0
            close(update.loading_gradients()[name], gradient)
        assert len(expected_loadings) == (len(selection.sites) if form == "loaded" else 0)


@pytest.mark.parametrize("how", ["plain", "accumulated", "checkpointed"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "phi3"])
def test_gradients_are_those_of_a_lora_whose_b_is_the_membership(
    family: str, form: UpdateForm, mode: UpdateMode, how: str
) -> None:
    model = build(family).double()
    twin = copy.deepcopy(model)
    selection = choose(model, family, clusters=(0, 1, 1, 1))
    modules = {part.site.module: None for part in selection.sites}
    # a fused module holds two sites, each with two clusters of its own
    rank = 2 * len(selection.sites) // len(modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # a scale of one
        lora_dropout=0.0,
        target_modules=list(modules),
    )
    lora = get_peft_model(twin, config).double()
    with trainable(model, selection, update=form, mode=mode, dtype=torch.float64) as update:
        filled(update)
        places = {}
        taken: dict[str, int] = {}
        with torch.no_grad():
            for module in modules:
                twin.get_submodule(module).lora_B["default"].weight.zero_()
            for site in update.sites:
                layer = twin.get_submodule(site.part.site.module)
                first = taken.get(site.part.site.module, 0)
                taken[site.part.site.module] = first + 2
                rows = site.part.neurons + site.part.site.offset
                columns = site.part.clusters + first
                scale = torch.ones(4).double() if site.loadings is None else site.loadings
                layer.lora_A["default"].weight[first : first + 2] = site.vectors
                layer.lora_B["default"].weight[rows, columns] = scale
                places[site.part.site.name] = (layer, first, rows, columns)
        for layer, *_ in places.values():  # frozen to M in the shared form: the paper's identity
            layer.lora_B["default"].weight.requires_grad_(form == "loaded")
        blocks = blocks_of(model, [part.site for part in selection.sites])
        with checkpointed(blocks.modules if how == "checkpointed" else ()):
            for seed in (0, 1) if how == "accumulated" else (0,):
                ids = tokens(seed=seed)
                loss_of(lora, ids).backward()
                loss_of(model, ids).backward()
        for site in update.sites:
            layer, first, rows, columns = places[site.part.site.name]
            found = update.gradients()[site.part.group]
            close(found, layer.lora_A["default"].weight.grad[first : first + 2])
            if form == "loaded":
                gradient = layer.lora_B["default"].weight.grad
                close(update.loading_gradients()[site.part.site.name], gradient[rows, columns])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_accumulate_until_they_are_cleared(form: UpdateForm) -> None:
    model = build().double()
    twin = copy.deepcopy(model)
    selection = choose(model)
    batches = [tokens(seed=0), tokens(n_rows=1, length=5, seed=1)]
    with trainable(model, selection, update=form, dtype=torch.float64) as update:
        filled(update)
        expected, _ = dense_gradients(twin, update, lambda run: run(batches[0]) + run(batches[1]))
        for ids in batches:
            loss_of(model, ids).backward()
        for group, gradient in expected.items():
            close(update.gradients()[group], gradient)
        NeuronAdamW(update).zero_grad()
        assert update.packed.grad is None and update.gradients() == {}
        loss_of(model, batches[1]).backward()
        expected, _ = dense_gradients(twin, update, lambda run: run(batches[1]))
        for group, gradient in expected.items():
            close(update.gradients()[group], gradient)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])
def test_gradient_checkpointing_changes_nothing(
    family: str, form: UpdateForm, mode: UpdateMode, own: bool
) -> None:
    model = build(family)
    found = []
    for checkpointing in (False, True):
        blocks: Sequence[nn.Module] = ()
        if checkpointing and own:
            blocks = blocks_of(model, [part.site for part in choose(model, family).sites]).modules
        elif checkpointing:
            model.train()  # transformers checkpoints in training mode only; there is no dropout
            # transformers renamed it within its fifth version
            name = "activation_checkpointing_enable"
            enable = getattr(model, name, None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        selection = choose(model, family)
        with (
            trainable(model, selection, update=form, mode=mode) as update,
            checkpointed(blocks),
        ):
            filled(update)
            loss_of(model, tokens()).backward()
            found.append(update.packed.grad.clone())
    assert float(found[0].abs().max()) > 0
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_a_vector_shared_by_sites_gets_their_summed_gradient(
    form: UpdateForm, mode: UpdateMode
) -> None:
    model = build().double()
    twin = copy.deepcopy(model)
    selection = layer_wide(model)
    with trainable(model, selection, update=form, mode=mode, dtype=torch.float64) as update:
        filled(update)
        ids = tokens()
        expected, _ = dense_gradients(twin, update, lambda run: run(ids))
        loss_of(model, ids).backward()
        assert list(expected) == ["layer 0", "layer 1"]
        for group, gradient in expected.items():
            close(update.gradients()[group], gradient)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_modes_give_the_same_output(family: str, form: UpdateForm) -> None:
    outputs = []
    for mode in MODES:
        model = build(family).double()
        with trainable(
            model, choose(model, family), update=form, mode=mode, dtype=torch.float64
        ) as update:
            plain = model(tokens()).logits
            filled(update)
            with torch.no_grad():
                outputs.append(model(tokens()).logits)
            assert not torch.allclose(plain, outputs[-1])
            with update.removed(), torch.no_grad():
                torch.testing.assert_close(model(tokens()).logits, plain.detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_a_backward_pass_over_a_part_of_the_model_reaches_what_ran(mode: UpdateMode) -> None:
    model = build()
    with trainable(model, choose(model), mode=mode) as update:
        filled(update)
        states = model.model.embed_tokens(tokens())
        model.model.layers[1].mlp(states).sum().backward()
        reached = {name for name, grad in update.gradients().items() if grad.any()}
        assert reached == {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"}


def test_no_backward_work_is_done_below_the_lowest_tuned_layer() -> None:
    model = build()
    selection = choose(model).in_layers(1, 2)
    graph_nodes = []
    with trainable(model, selection):
        model.model.layers[0].register_forward_hook(
            lambda _module, _args, output: graph_nodes.append(output.requires_grad)
        )
        loss_of(model, tokens()).backward()
    assert graph_nodes == [False]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_a_weights_size_is_allocated_in_a_step(
    form: UpdateForm, mode: UpdateMode
) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    model = build()
    n_weight = F * 16  # the batch is far smaller: 2 rows of 3 tokens
    allocated: list[tuple[str, tuple[int, ...]]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            own = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
            for value in out if isinstance(out, (tuple, list)) else (out,):
                fresh = isinstance(value, Tensor) and (
                    value.untyped_storage().data_ptr() not in own
                )
                # the update's own buffers are one-dimensional
                if fresh and value.ndim >= 2 and value.numel() >= n_weight:
                    allocated.append((str(func), tuple(value.shape)))
            return out

    small = torch.randint(7, 30, (1, 2))
    vocabulary = model.config.vocab_size
    with trainable(model, choose(model), update=form, mode=mode) as update:
        optimizer = NeuronAdamW(update)
        with Watch():
            for _ in range(2):
                loss_of(model, small).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert update.packed.any()
    assert not [entry for entry in allocated if vocabulary not in entry[1]]
    # the watch sees a dense gradient where there is one
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with Watch():
        loss_of(model, small).backward()
    assert any(sorted(shape) == [16, F] for _, shape in allocated)
