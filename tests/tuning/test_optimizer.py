"""NeuronAdamW trains as torch's AdamW does on dense weights, and keeps its buffers' views."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import build, choose, state_of
from torch import Tensor, nn
from torch.func import functional_call

from nest.errors import InputError
from nest.selection.config import UpdateForm
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.update import trainable

STEPS = 30
# The model runs in fp64; U and its moments are fp32 against the oracle's fp64, for thirty steps in which
# Adam divides small gradients by small roots.
LOSS_TOLERANCE = 2e-5


def tokens(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(7, 30, (4, 8), generator=draw)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def curve_of_ours(
    model: nn.Module, form: UpdateForm, weight_decay: float, **chosen: object
) -> list[float]:
    losses = []
    with trainable(model, choose(model, **chosen), update=form) as update:
        optimizer = NeuronAdamW(update, lr=0.02, weight_decay=weight_decay)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(model, tokens(step % 3))
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def test_one_cluster_a_neuron_is_adamw_on_the_masked_dense_weight() -> None:
    model = build().double()
    twin = copy.deepcopy(model)
    neurons = (1, 4, 7, 23)
    ours = curve_of_ours(model, "shared", 0.0, neurons=neurons, clusters=(0, 1, 2, 3))
    weights = [part.site.parameter for part in choose(twin).sites]
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in weights)
    parameters = [twin.get_parameter(name) for name in weights]
    oracle = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)
    mask = torch.zeros(parameters[0].shape[0], 1, dtype=torch.float64)
    mask[list(neurons)] = 1.0
    theirs = []
    for step in range(STEPS):
        oracle.zero_grad()
        loss = loss_of(twin, tokens(step % 3))
        loss.backward()
        for parameter in parameters:
            parameter.grad *= mask
        oracle.step()
        theirs.append(float(loss.detach()))
    assert theirs[-1] < 0.9 * theirs[0]
    assert ours == pytest.approx(theirs, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("form", ["shared", "loaded"])
@pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])
def test_clusters_are_adamw_through_dense_weights(
    family: str, form: UpdateForm, weight_decay: float
) -> None:
    model = build(family).double()
    twin = copy.deepcopy(model)
    ours = curve_of_ours(model, form, weight_decay, family=family)
    with trainable(model, choose(model, family), update=form) as update:  # for the loadings' start
        starts = {s.part.site.name: s.loadings for s in update.sites}
    vectors, loadings = [], []
    for part in choose(twin, family).sites:
        start = starts[part.site.name]
        size = (part.n_clusters, part.width)
        vectors.append(torch.zeros(size, dtype=torch.float64, requires_grad=True))
        ones = torch.ones(part.neurons.numel(), dtype=torch.float64)
        ones = ones if start is None else start.detach().double().clone().requires_grad_()
        loadings.append(ones)
    groups = [{"params": vectors, "weight_decay": weight_decay}]
    if form == "loaded":  # loadings rest at one and do not decay
        groups.append({"params": loadings, "weight_decay": 0.0})
    oracle = torch.optim.AdamW(groups, lr=0.02)
    base, theirs = state_of(twin), []
    for step in range(STEPS):
        oracle.zero_grad()
        weights = {
            part.site.parameter: base[part.site.parameter].index_add(
                0, part.neurons, s[:, None] * u[part.clusters]
            )
            for part, u, s in zip(choose(twin, family).sites, vectors, loadings, strict=True)
        }
        ids = tokens(step % 3)
        loss = functional_call(twin, weights, kwargs={"input_ids": ids, "labels": ids}).loss
        loss.backward()
        oracle.step()
        theirs.append(float(loss.detach()))
    assert theirs[-1] < theirs[0]
    assert ours == pytest.approx(theirs, rel=LOSS_TOLERANCE)


def test_schedulers_clipping_and_closures_work() -> None:
    model = build()
    with trainable(model, choose(model), update="shared") as update:
        optimizer = NeuronAdamW(update, lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.01 / (step + 1))

        def closure() -> float:
            optimizer.zero_grad()
            loss = loss_of(model, tokens(0))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(update.parameters(), 1e-3)
            return float(loss.detach())

        losses = []
        for _ in range(4):
            losses.append(optimizer.step(closure))
            schedule.step()
        assert float(update.packed.grad.norm()) <= 1.001e-3
        assert losses[-1] < losses[0]
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 / 5)
        clipped = torch.cat([g.flatten() for g in update.gradients().values()])
        assert float(clipped.norm()) <= 1.001e-3  # the views share the clipped gradient


@pytest.mark.parametrize("set_to_none", [True, False])
def test_clearing_keeps_the_views(set_to_none: bool) -> None:
    model = build()
    with trainable(model, choose(model)) as update:
        optimizer = NeuronAdamW(update)
        for _ in range(2):
            loss_of(model, tokens(0)).backward()
            assert update.packed.grad.any()
            optimizer.zero_grad(set_to_none=set_to_none)
            assert not update.packed.grad.any()


def test_state_is_the_updates_alone_and_can_be_resumed() -> None:
    model = build()
    selection = choose(model)
    ends = []
    for resumed in (False, True):
        with trainable(model, selection) as update:
            optimizer = NeuronAdamW(update, lr=0.01)
            for step in range(4):
                if resumed and step == 2:
                    state = copy.deepcopy(optimizer.state_dict())
                    optimizer = NeuronAdamW(update, lr=0.5)
                    optimizer.load_state_dict(state)
                optimizer.zero_grad()
                loss_of(model, tokens(step)).backward()
                optimizer.step()
            held = [value for value in optimizer.state[update.packed].values() if value.ndim]
            assert sum(value.numel() for value in held) == 2 * update.packed.numel()
            ends.append(update.packed.detach().clone())
    assert torch.equal(ends[0], ends[1])


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}, {"weight_decay": -0.1}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    model = build()
    with (
        trainable(model, choose(model)) as update,
        pytest.raises(InputError, match="none may be negative"),
    ):
        NeuronAdamW(update, **wrong)
