"""NeuronAdamW trains as torch's AdamW does on dense weights, and keeps its buffers' views."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_models import build, choose, same_bits, state_of
from torch import Tensor, nn
from torch.func import functional_call

from nest.errors import InputError
from nest.selection.config import UpdateForm
from nest.tuning.config import UpdateMode
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.update import trainable

STEPS = 50
# All in fp64; fifty steps in which Adam divides small gradients by small roots.
LOSS_TOLERANCE = 1e-9


def tokens(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(7, 30, (4, 8), generator=draw)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def curve_of_ours(
    model: nn.Module,
    form: UpdateForm,
    weight_decay: float,
    mode: UpdateMode = "live",
    **chosen: object,
) -> list[float]:
    losses = []
    with trainable(
        model, choose(model, **chosen), update=form, mode=mode, dtype=torch.float64
    ) as update:
        optimizer = NeuronAdamW(update, lr=0.02, weight_decay=weight_decay)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(model, tokens(step % 3))
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("mode", ["live", "branch"])
def test_one_cluster_a_neuron_is_adamw_on_the_masked_dense_weight(mode: UpdateMode) -> None:
    model = build().double()
    twin = copy.deepcopy(model)
    neurons = (1, 4, 7, 23)
    ours = curve_of_ours(model, "shared", 0.0, mode, neurons=neurons, clusters=(0, 1, 2, 3))
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
    assert theirs[48] < 0.9 * theirs[0]  # the same batch
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
    with trainable(model, choose(model, family), update=form) as update:  # where it begins
        starts = {s.part.site.name: (s.vectors, s.loadings) for s in update.sites}
    vectors, loadings = [], []
    for part in choose(twin, family).sites:
        first, start = starts[part.site.name]
        vectors.append(first.detach().double().clone().requires_grad_())
        ones = torch.ones(part.neurons.numel(), dtype=torch.float64)
        ones = ones if start is None else start.detach().double().clone().requires_grad_()
        loadings.append(ones)
    groups = [{"params": vectors, "weight_decay": weight_decay}]
    if form == "loaded":  # loadings do not decay
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
    assert theirs[48] < theirs[0]  # the same batch
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
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01 / 5)
        clipped = torch.cat([g.flatten() for g in update.gradients().values()])
        assert float(clipped.norm()) <= 1.001e-3  # the views share the clipped gradient


@pytest.mark.parametrize("clear", ["optimizer", "model", "zeros"])
def test_gradients_can_be_cleared_from_everywhere(clear: str) -> None:
    model = build()
    with trainable(model, choose(model)) as update:
        optimizer = NeuronAdamW(update)
        found = []
        for _ in range(2):
            loss_of(model, tokens(0)).backward()
            found.append(update.packed.grad.clone())
            if clear == "model":  # as transformers' Trainer does
                model.zero_grad()
            else:
                optimizer.zero_grad(set_to_none=clear == "optimizer")
            assert not any(g.any() for g in update.gradients().values())
        assert found[0].any() and torch.equal(found[0], found[1])
        before = update.packed.detach().clone()
        if clear != "zeros":
            optimizer.step()  # without a gradient nothing happens
            assert torch.equal(before, update.packed)


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


def test_a_state_can_be_loaded_as_saved_files_hold_it(tmp_path: Path) -> None:
    model = build()
    with trainable(model, choose(model)) as update:
        optimizer = NeuronAdamW(update, lr=0.01)
        loss_of(model, tokens(0)).backward()
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        again = NeuronAdamW(update, lr=0.5)
        again.load_state_dict(state)
        assert float(again.param_groups[0]["lr"]) == pytest.approx(0.01)
        own = again.state[update.packed]
        assert own["step"] == 1 and own["step"].device == update.packed.device
        again.param_groups[0]["lr"] = 0.25  # a loop may set a plain number
        loss_of(model, tokens(1)).backward()
        again.step()
        assert float(again.param_groups[0]["lr"]) == 0.25
    with (
        trainable(model, choose(model, neurons=(1, 2), clusters=(0, 0))) as update,
        pytest.raises(InputError, match="another selection or form"),
    ):
        NeuronAdamW(update).load_state_dict(state)


def test_parameters_that_are_not_the_updates_are_refused() -> None:
    model = build()
    with trainable(model, choose(model)) as update:
        with pytest.raises((InputError, TypeError), match=r"cluster update|ClusterUpdate"):
            NeuronAdamW(model.parameters())
        optimizer = NeuronAdamW(update)
        with pytest.raises(InputError, match="no other"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        with pytest.raises(InputError, match="no other"):
            optimizer.add_param_group({"params": nn.Parameter(torch.zeros(3))})
        assert len(optimizer.param_groups) == 1


def rows_of(n: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens(i)[0], "labels": tokens(i)[0]} for i in range(n)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_transformers_trainer_trains_it(tmp_path: Path, accumulation: int) -> None:
    import transformers

    model = build()
    selection = choose(model)
    before = state_of(model)
    found = []
    with trainable(model, selection, update="shared") as update:
        optimizer = NeuronAdamW(update, lr=0.02)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            max_grad_norm=0.5,
            lr_scheduler_type="cosine",
            logging_steps=1,
            report_to=[],
            save_strategy="steps",
            save_steps=2,
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=rows_of(12),
            optimizers=(optimizer, None),
        )
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        assert len(logs) == 3 and all(entry["grad_norm"] > 0 for entry in logs)
        assert logs[0]["learning_rate"] != logs[-1]["learning_rate"]
        assert update.packed.grad is None or not update.packed.grad.any()  # cleared by the Trainer
        assert optimizer.state[update.packed]["step"] == 3
        found.append(update.packed.detach().clone())
        patch = update.patch()
        tuned = state_of(model)
    assert found[0].any() and same_bits(before, state_of(model))
    patch.fold_into(model)
    assert same_bits(tuned, state_of(model))


def test_accelerate_trains_it() -> None:
    from accelerate import Accelerator

    ends = []
    for prepared in (False, True):
        model = build()
        with trainable(model, choose(model), update="shared") as update:
            optimizer: torch.optim.Optimizer = NeuronAdamW(update, lr=0.02)
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
            network = model
            if prepared:
                network, optimizer = accelerator.prepare(model, optimizer)
            for step in range(4):
                loss = loss_of(network, tokens(step)) / 2
                if not prepared:
                    loss.backward()
                    if step % 2:
                        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                        optimizer.step()
                        optimizer.zero_grad()
                    continue
                with accelerator.accumulate(network):
                    accelerator.backward(2 * loss)  # accelerate divides by itself
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(network.parameters(), 0.1)
                    optimizer.step()
                    optimizer.zero_grad()
            ends.append(update.packed.detach().clone())
    assert ends[0].any()
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_needs_no_scaler(dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    with trainable(model, choose(model), update="shared") as update:
        optimizer = NeuronAdamW(update, lr=0.02)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = loss_of(model, tokens(0))
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert update.packed.dtype == update.packed.grad.dtype == torch.float32
    assert losses[-1] < losses[0]


def test_autocast_works() -> None:
    model = build()
    with trainable(model, choose(model)) as update:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, tokens(0))
        loss.backward()
        assert update.packed.grad.dtype == torch.float32 and update.packed.grad.any()


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


@pytest.mark.parametrize("mode", ["live", "branch"])
def test_any_optimizer_trains_and_the_rows_follow(mode: UpdateMode) -> None:
    model = build()
    with trainable(model, choose(model), mode=mode) as update:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(12):
            loss = loss_of(model, tokens(0))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        with torch.no_grad():
            end = float(loss_of(model, tokens(0)))
        patch = update.patch()
    assert losses[-1] < 0.95 * losses[0] and end < losses[-1]
    patch.fold_into(model)
    # live: the very bits; branch: fp32 sums in another order
    folded = float(loss_of(model, tokens(0)).detach())
    assert folded == (end if mode == "live" else pytest.approx(end, rel=1e-5))
