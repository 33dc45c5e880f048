"""Tuning lowers the loss, keeps its best step, and gives the model back as it was."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tiny_models import (
    BENIGN,
    HARMFUL,
    build,
    choose,
    encoder_of,
    same_bits,
    state_of,
    word_tokenizer,
)
from torch import nn
from torch.nn import functional as F

import nest
from nest.errors import ActivationError, InputError, SelectionError
from nest.prompts.prompt_set import from_values
from nest.tuning.config import TuningConfig
from nest.tuning.dialogues import encode_dialogues, split_validation
from nest.tuning.loop import learning_rate_factor
from nest.tuning.tune import TuningResult, tune_update

QUICK: dict[str, Any] = {
    "batch_size": 16,
    "micro_batch_size": 16,
    "max_steps": 12,
    "validate_every": 4,
    "validation": 0.2,
    "learning_rate": 0.05,
    "epochs": 9.0,
}


def tuned(model: nn.Module, **settings: Any) -> TuningResult:
    return tune_update(
        model,
        encoder_of(model),
        choose(model),
        harmful=from_values(HARMFUL, "harmful"),
        benign=from_values(BENIGN, "benign"),
        config=TuningConfig(**{**QUICK, **settings}),
    )


def validation_loss(model: nn.Module, settings: dict[str, Any]) -> float:
    """Oracle: token mean of the cross-entropy on the held-back dialogues, one at a time."""
    encoder = encoder_of(model)
    _, held = split_validation(
        encode_dialogues(encoder, from_values(HARMFUL), benign=False),
        encode_dialogues(encoder, from_values(BENIGN), benign=True),
        share=settings["validation"],
        seed=0,
    )
    losses: list[float] = []
    for example in held:
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, example.n_prompt - 1 : -1]
        targets = ids[0, example.n_prompt :]
        losses += F.cross_entropy(logits, targets, reduction="none").tolist()
    return sum(losses) / len(losses)


@pytest.mark.parametrize("form", ["shared", "loaded"])
def test_the_loss_falls_and_the_model_is_given_back(form: str) -> None:
    model = build()
    model.model.layers[1].train()  # mixed modes come back mixed
    before, modes = state_of(model), [module.training for module in model.modules()]
    result = tuned(model, update=form)
    assert same_bits(before, state_of(model))
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_hooks for module in model.modules())
    first, last = result.history[0], result.history[-1]
    assert (first.step, first.train_loss, last.step) == (0, None, 12)
    assert [record.step for record in result.history] == [0, 4, 8, 12]
    assert last.validation_loss < 0.96 * first.validation_loss
    assert result.patch.update == form
    assert result.tokens_per_second > 0


def test_the_best_step_is_kept_and_its_loss_is_the_oracles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    # a rate that spoils the model after the fifth step
    schedule = "nest.tuning.loop.learning_rate_factor"
    monkeypatch.setattr(schedule, lambda step, _n_steps, _warmup: 1.0 if step < 5 else 1000.0)
    settings = {"kl_weight": 0.0, "validate_every": 1, "learning_rate": 0.05, "max_steps": 7}
    result = tuned(model, **settings)
    losses = [record.validation_loss for record in result.history]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert result.best_step == result.history[best].step
    assert 0 < result.best_step < result.steps, losses
    found = [validation_loss(model, {**QUICK, **settings})]
    with result.patch.applied(model):
        found.append(validation_loss(model, {**QUICK, **settings}))
    # fp32 logits in batches of other shapes: a few units of 2**-24 a token
    assert found == pytest.approx([losses[0], losses[best]], rel=1e-5)


def test_where_no_step_helps_the_patch_changes_nothing() -> None:
    model = build()
    before = state_of(model)
    result = tuned(model, learning_rate=1e4, clip=0.0, update="shared", max_steps=2)
    assert result.best_step == 0
    result.patch.fold_into(model)
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items())


def test_the_seed_decides_everything() -> None:
    results = [tuned(build(), seed=seed, max_steps=4) for seed in (0, 0, 1)]
    first, again, other = (result.patch.vectors for result in results)
    assert all(torch.equal(values, again[group]) for group, values in first.items())
    assert not all(torch.equal(values, other[group]) for group, values in first.items())
    state = torch.random.get_rng_state()
    tuned(build(), max_steps=1)  # build() seeds torch with 0; tuning draws nothing from it
    after = torch.random.get_rng_state()
    build()
    assert torch.equal(after, torch.random.get_rng_state())
    torch.random.set_rng_state(state)


@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
def test_micro_batches_do_not_change_what_is_learnt(kl_weight: float) -> None:
    results = [
        tuned(build().double(), micro_batch_size=size, kl_weight=kl_weight, learning_rate=0.02)
        for size in (16, 3)
    ]
    losses = [[record.validation_loss for record in result.history] for result in results]
    # sums in another order, carried through twelve steps of Adam
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_kl_term_is_zero_at_the_start_and_keeps_the_model_near() -> None:
    from nest.evaluation.divergence import kl_to_base

    drift = []
    for weight in (0.0, 5.0):
        model = build()
        result = tuned(model, kl_weight=weight, benign_weight=0.0, max_steps=16)
        drift.append((result, model))
    # The base's own cross-entropy, whatever the weight of a KL that is zero.
    starts = [result.history[0].validation_loss for result, _ in drift]
    assert starts[0] == pytest.approx(starts[1], rel=1e-6)
    kl = []
    for result, model in drift:
        result.patch.fold_into(model)
        kl.append(kl_to_base(model, encoder_of(model), BENIGN, result.patch))
    assert kl[1] < 0.7 * kl[0]


def test_dropout_is_off() -> None:
    histories = []
    for rate in (0.0, 0.5):
        model = build("gpt2")
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = rate
        encoder = encoder_of(model)
        result = tune_update(
            model,
            encoder,
            choose(model, "gpt2"),
            harmful=from_values(HARMFUL),
            benign=from_values(BENIGN),
            config=TuningConfig(**{**QUICK, "max_steps": 2}),
        )
        histories.append([record.validation_loss for record in result.history])
        assert model.training
    assert histories[0] == histories[1]


def test_numbers_that_are_not_finite_name_the_site_and_leave_the_model() -> None:
    model = build()
    selection = choose(model)
    with torch.no_grad():  # a token that stands in every prompt
        model.get_input_embeddings().weight[4] = float("inf")
    before = state_of(model)
    with pytest.raises(ActivationError, match=r"at step 1 the loss is nan.*layers\.0\.mlp"):
        tune_update(
            model,
            encoder_of(model),
            selection,
            harmful=from_values(HARMFUL),
            benign=from_values(BENIGN),
            config=TuningConfig(**QUICK),
        )
    assert same_bits(before, state_of(model))


def test_what_was_done_is_on_record() -> None:
    result = tuned(build(), max_steps=2, validate_every=1)
    record = result.patch.provenance["tuning"]
    assert record["config"]["learning_rate"] == QUICK["learning_rate"]
    assert record["best_step"] == result.best_step and record["steps"] == 2
    assert len(record["history"]) == len(result.history) == 3
    assert record["prompts"]["harmful"]["n"] == len(HARMFUL)
    assert len(record["prompts"]["benign"]["sha256"]) == 64


def test_nest_tune_leaves_the_update_in_the_model_and_revert_takes_it_out() -> None:
    model = build()
    before, selection = state_of(model), choose(model)
    patch = nest.tune(model, word_tokenizer(), selection, harmful=HARMFUL, benign=BENIGN, **QUICK)
    assert not same_bits(before, state_of(model))
    fresh = build()
    patch.fold_into(fresh)
    assert same_bits(state_of(fresh), state_of(model))
    patch.revert(model)
    assert same_bits(before, state_of(model))


def test_bad_input_has_its_sentence() -> None:
    model = build()
    tokenizer, selection = word_tokenizer(), choose(model)

    def tune(**changed: Any) -> None:
        arguments = {"harmful": HARMFUL, "benign": BENIGN, **QUICK, **changed}
        nest.tune(model, tokenizer, arguments.pop("selection", selection), **arguments)

    before = state_of(model)
    for changed, said in (
        ({"harmful": HARMFUL[:1]}, "there are 1 harmful dialogues"),
        ({"benign": ["no response"]}, "without responses"),
        ({"benign": [("a prompt", " ")]}, "response is empty"),
        ({"harmful": [("how " * 60, "no")] * 4}, r"comes to \d+ tokens.*context is 48"),
        ({"selection": None}, "tune needs a selection"),
        ({"learning_rat": 1.0}, r"no such setting: learning_rat; there are update"),
        ({"epochs": -1.0, "warmup": 1.0}, r"epochs is -1.*; warmup is 1"),
        ({"n_clusters": 0}, "n_clusters is 0"),
    ):
        with pytest.raises(InputError, match=said):
            tune(**changed)
    with pytest.raises(SelectionError, match="no activation profiles"):
        tune(n_clusters=2)
    with pytest.raises(SelectionError, match="another model"):
        tune(selection=choose(build(seed=1)))
    assert same_bits(before, state_of(model))


@pytest.mark.parametrize(
    ("n_steps", "warmup"), [(10, 0.0), (10, 0.3), (1, 0.5), (1, 0.0), (7, 0.99)]
)
def test_the_schedule_warms_up_to_one_and_falls_to_zero(n_steps: int, warmup: float) -> None:
    factors = [learning_rate_factor(step, n_steps, warmup) for step in range(n_steps + 1)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    n_warmup = round(warmup * n_steps)
    assert factors[: n_warmup + 1] == sorted(factors[: n_warmup + 1])
    assert factors[n_warmup:] == sorted(factors[n_warmup:], reverse=True)
    assert factors[0] > 0 and math.isclose(
        factors[n_warmup], 1.0 if n_warmup < n_steps else factors[-1]
    )


def test_configs_report_all_faults_together() -> None:
    assert TuningConfig() == copy.deepcopy(TuningConfig())
    with pytest.raises(InputError) as raised:
        TuningConfig(batch_size=0, clip=-1.0, validation=1.0, max_steps=0)
    for name in ("batch_size", "clip", "validation", "max_steps"):
        assert f"{name} is" in str(raised.value)
