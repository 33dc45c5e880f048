"""The automatic rate: its first step moves every projection by the same share of its output."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import BENIGN, HARMFUL, build, encoder_of, layout_of, same_bits, state_of
from torch import nn

from nest.conversations.answers import target_logits
from nest.errors import NoMemoryError
from nest.models.layouts import find_sites
from nest.prompts.prompt_set import from_values
from nest.selection.selection import NeuronSelection
from nest.tuning import tune
from nest.tuning.config import STEP_SHARES, TuningConfig, UpdateStart
from nest.tuning.dialogues import MicroBatch, prepare
from nest.tuning.objective import Supervised
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.rate import output_share
from nest.tuning.tune import tune_update
from nest.tuning.update import ClusterUpdate, trainable

STARTS: tuple[UpdateStart, ...] = ("zero_vectors", "zero_loadings")


def every(model: nn.Module, n: int | None = None, family: str = "qwen3") -> NeuronSelection:
    """The first n neurons of every site, or all of them, in one cluster."""
    chosen, layout = {}, layout_of(family)
    for site in find_sites(model, layout):
        count = site.length if n is None else n
        chosen[site.name] = (range(count), [0] * count)
    return NeuronSelection.of(model, chosen, layout=layout)


def batches_of(model: nn.Module) -> list[MicroBatch]:
    encoder = encoder_of(model)
    config = TuningConfig(validation=0.2)
    train, _, _ = prepare(encoder, from_values(HARMFUL), from_values(BENIGN), config)
    return [MicroBatch.of(train[:3], encoder.pad_id), MicroBatch.of(train[-3:], encoder.pad_id)]


def objective_of(model: nn.Module, update: ClusterUpdate) -> Supervised:
    return Supervised(
        lambda micro_batch: target_logits(model, micro_batch.batch, torch.device("cpu")),
        update,
        benign_weight=1.0,
        kl_weight=0.0,
    )


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "phi3"])
def test_it_is_what_a_step_adds_to_the_outputs(family: str, start: UpdateStart) -> None:
    """Against an oracle: the optimizer takes a small step, and the outputs are looked at again."""
    model, rate = build(family), 1e-4
    selection, micro_batches = every(model, 5, family), batches_of(model)
    outputs: dict[str, list[torch.Tensor]] = {}

    def outputs_now(update: ClusterUpdate) -> dict[str, torch.Tensor]:
        handles = []
        for site in update.sites:
            first, length = site.part.site.offset, site.part.site.length

            def keep(_m: Any, _i: Any, out: torch.Tensor, name: str = site.part.site.name) -> None:
                mask = micro_batches[len(outputs[name])].batch.attention_mask.bool()
                outputs[name].append(out.detach()[mask])

            outputs[site.part.site.name] = []
            handles.append((site.module.register_forward_hook(keep), first, length))
        for micro_batch in micro_batches:
            with torch.no_grad():
                target_logits(model, micro_batch.batch, torch.device("cpu"))
        found = {}
        for site, (handle, first, length) in zip(update.sites, handles, strict=True):
            handle.remove()
            whole = torch.cat(outputs[site.part.site.name])
            found[site.part.site.name] = whole[:, first : first + length].double()
        return found

    shares = {}
    for lowest in sorted({part.site.layer for part in selection.sites}):
        # layer by layer: what a lower layer's step does to a higher one's input is not counted
        part = selection.in_layers(lowest, lowest + 1)
        with trainable(model, part, update="loaded", start=start) as update:
            objective = objective_of(model, update)
            told = output_share(update, objective, micro_batches)
            before = outputs_now(update)
            optimizer = NeuronAdamW(update, lr=rate, eps=1e-30)
            for loss in objective.losses(micro_batches, 0):
                loss.backward()
            optimizer.step()
            after = outputs_now(update)
        ratios = [
            float((after[name] - y).square().sum() / y.square().sum()) for name, y in before.items()
        ]
        shares[lowest] = told, math.sqrt(sum(ratios) / len(ratios)) / rate
    for told, oracle in shares.values():
        # fp32 differences of outputs a ten-thousandth apart
        assert told == pytest.approx(oracle, rel=2e-2)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 8, None])
def test_no_number_of_neurons_makes_it_diverge(
    n: int | None, dtype: torch.dtype, start: UpdateStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first rate: without beginning anew and without backing off."""
    model = build().to(dtype)
    before = state_of(model)
    monkeypatch.setattr(tune, "RATE_SHARES", (1.0,))
    told: list[str] = []
    result = tune_update(
        model,
        encoder_of(model),
        every(model, n),
        harmful=from_values(HARMFUL),
        benign=from_values(BENIGN),
        config=TuningConfig(
            start=start, batch_size=8, max_steps=12, validate_every=4, validation=0.2, epochs=9.0
        ),
        warn=told.append,
    )
    assert not told
    first = result.history[0].validation_loss
    assert all(record.validation_loss < 1.05 * first for record in result.history)
    assert result.best_step > 0
    assert same_bits(before, state_of(model))


def test_it_does_not_hang_on_the_scale_of_the_weights() -> None:
    """Rows ten times as large under activations a tenth as large: the same share of the output."""
    model = build()
    rates = []
    for scale in (1.0, 10.0):
        with torch.no_grad():
            for site in find_sites(model):
                model.get_submodule(site.module).weight.mul_(scale)
        with trainable(model, every(model, 4), update="shared") as update:
            rates.append(output_share(update, objective_of(model, update), batches_of(model)))
    # the model is another one then, and with it the gradient's signs
    assert rates[1] < 0.5 * rates[0]


def test_a_loss_that_breaks_is_gone_back_from(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tune.TrainingLoop._factor

    def spoiled(self: Any, step: int) -> float:
        return real(self, step) * (1e4 if step == 6 and not self.backed_off else 1.0)

    monkeypatch.setattr(tune.TrainingLoop, "_factor", spoiled)
    told: list[str] = []
    model = build()

    def run(**settings: Any) -> Any:
        return tune_update(
            model,
            encoder_of(model),
            every(model, 8),
            harmful=from_values(HARMFUL),
            benign=from_values(BENIGN),
            config=TuningConfig(
                **{
                    **{"batch_size": 8, "max_steps": 16, "validate_every": 2, "validation": 0.2},
                    **{"epochs": 9.0, "clip": 0.0, **settings},
                }
            ),
            warn=told.append,
        )

    result = run()
    record = result.patch.provenance["tuning"]
    assert record["backed_off"] and record["backed_off"][0] in (7, 8)
    assert "going on from step 6 with a quarter" in told[0]
    rates = {entry.step: entry.learning_rate for entry in result.history}
    assert result.best_step > record["backed_off"][0]
    last = max(step for step in rates if step < 16)
    assert rates[last] < 0.3 * rates[6]
    # a rate of the user's own is kept, and what was good before is what comes back
    told.clear()
    own = run(learning_rate=float(record["config"]["learning_rate"]))
    assert own.best_step == 6 and not told


def test_it_is_measured_in_the_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    real, limit = tune.target_logits, 2

    def scarce(model: Any, batch: Any, device: torch.device) -> Any:
        if len(batch.indices) > limit:
            raise MemoryError("x")
        return real(model, batch, device)

    monkeypatch.setattr(tune, "target_logits", scarce)
    model = build()

    def run() -> Any:
        return tune_update(
            model,
            encoder_of(model),
            every(model, 8),
            harmful=from_values(HARMFUL),
            benign=from_values(BENIGN),
            config=TuningConfig(batch_size=8, max_steps=4, validation=0.2, epochs=9.0),
            warn=lambda _text: None,
        )

    assert run().best_step > 0
    limit = 0
    with pytest.raises(NoMemoryError, match="no memory for a single dialogue"):
        run()


def test_the_shares_are_those_of_the_starts() -> None:
    assert set(STEP_SHARES) == set(STARTS)
