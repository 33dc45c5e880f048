"""Tuning lowers the loss, keeps its best step, and gives the model back as it was."""

from __future__ import annotations

import copy
import math
import resource
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import (
    BENIGN,
    HARMFUL,
    build,
    choose,
    encoder_of,
    quantised,
    same_bits,
    state_of,
    word_tokenizer,
)
from torch import nn
from torch.nn import functional as F

import nest
from nest.errors import (
    ActivationError,
    InputError,
    NoImprovementError,
    SelectionError,
    TuningStoppedError,
)
from nest.prompts.prompt_set import from_values
from nest.tuning.config import TuningConfig
from nest.tuning.dialogues import encode_dialogues, split_validation
from nest.tuning.loop import learning_rate_factor
from nest.tuning.prefix import FrozenPrefix, HiddenStates
from nest.tuning.tune import Training, TuningResult, tune_update

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
            logits = model(input_ids=ids).logits[0, example.said - 1 : -1]
        targets = ids[0, example.said :]
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
    assert last.validation_loss < 0.97 * first.validation_loss
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


def test_where_no_step_helps_there_is_no_patch() -> None:
    model = build()
    before = state_of(model)
    with pytest.raises(NoImprovementError, match="no step lowered the validation loss") as raised:
        tuned(model, learning_rate=1e4, clip=0.0, update="shared", max_steps=2)
    done = raised.value.training
    assert isinstance(raised.value, InputError) and isinstance(done, Training)
    assert done.steps == 2 and done.trainable_parameters > 0
    losses = [record.validation_loss for record in done.history]
    assert min(losses) == losses[0] and len(losses) > 1
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
        kl.append(
            kl_to_base(model, encoder_of(model), BENIGN, partial(result.patch.removed, model))
        )
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
        (
            {"harmful": [("how " * 60, "cannot help with that")] * 4},
            r"comes to \d+ tokens.*context is 48",
        ),
        ({"selection": None}, "tune needs a selection"),
        ({"learning_rat": 1.0}, r"no such setting: learning_rat; did you mean learning_rate"),
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


# --- layers, prefix, checkpointing, modes ---------------------------------------------------------


def same_training(first: TuningResult, second: TuningResult, rel: float) -> None:
    losses = [[record.validation_loss for record in r.history] for r in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=rel)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("form", ["shared", "loaded"])
def test_branch_mode_learns_the_same(form: str) -> None:
    settings = {"update": form, "learning_rate": 0.02}
    # fp32 buffers; in branch mode the sum with U is taken at the output
    same_training(
        tuned(build().double(), **settings),
        tuned(build().double(), mode="branch", **settings),
        1e-4,
    )


def test_checkpointing_changes_nothing() -> None:
    first, second = tuned(build()), tuned(build(), checkpointing=True)
    assert [r.validation_loss for r in first.history] == [r.validation_loss for r in second.history]
    assert second.memory.activations < first.memory.activations


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "opt"])
@pytest.mark.parametrize("bound_bytes", [2**30, 0])
def test_the_frozen_prefix_is_run_once_a_dialogue(
    family: str, bound_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        FrozenPrefix.__init__, "__kwdefaults__", {"bound_bytes": bound_bytes}, raising=True
    )
    results, runs = [], []
    for cached in (True, False):
        model = build(family).double()
        count = {"below": 0}
        inner = model.get_submodule(choose(model, family).sites[0].site.module)
        inner.register_forward_hook(
            lambda _m, _a, output, c=count: c.update(below=c["below"] + output.numel())
        )
        results.append(
            tune_update(
                model,
                encoder_of(model),
                choose(model, family),
                harmful=from_values(HARMFUL),
                benign=from_values(BENIGN),
                config=TuningConfig(**{**QUICK, "layers": (1, 2), "cache_prefix": cached}),
            )
        )
        runs.append(count["below"])
        assert all("forward" not in module.__dict__ for module in model.modules())
    same_training(*results, rel=1e-6)
    assert results[0].patch.provenance["tuning"]["prefix_cached"]
    assert {part.site.layer for part in results[0].patch.selection.sites} == {1}
    # each of 48 dialogues once, against 12 steps of 16, 4 validations and the base's passes
    assert runs[0] < 0.3 * runs[1]


def test_a_model_that_looks_back_past_the_cache_is_run_whole() -> None:
    model = build()
    first, second = model.model.layers
    kept: dict[str, Any] = {"mlp": 0.0}
    first.mlp.register_forward_hook(lambda _m, _a, output: kept.update(mlp=output))
    second.mlp.register_forward_hook(lambda _m, _a, output: output + kept["mlp"])
    warned: list[str] = []
    result = tune_update(
        model,
        encoder_of(model),
        choose(model),
        harmful=from_values(HARMFUL),
        benign=from_values(BENIGN),
        config=TuningConfig(**{**QUICK, "layers": (1, 2)}),
        warn=warned.append,
    )
    assert not result.patch.provenance["tuning"]["prefix_cached"]
    assert any("look back" in text for text in warned)


def test_hidden_states_outlive_a_full_disk() -> None:
    warned: list[str] = []
    states = HiddenStates(0, warned.append)
    examples = encode_dialogues(encoder_of(build()), from_values(HARMFUL[:4]), benign=False)
    values = [torch.randn(len(e.ids), 4).to(torch.bfloat16) for e in examples]
    states.add(examples[0], values[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # the disk takes half of the second one
        room = 2 * values[0].numel() + values[1].numel()
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        for example, value in zip(examples[1:], values[1:], strict=True):
            states.add(example, value)
            assert torch.equal(states.get(examples[0]), values[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(warned) == 1 and "no longer fit on the disk" in warned[0]
    assert [example in states for example in examples] == [True, False, False, False]


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_little_looking_back_is_seen(share: float, dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    kept: dict[str, Any] = {"mlp": 0.0}
    first, second = model.model.layers
    first.mlp.register_forward_hook(lambda _m, _a, output: kept.update(mlp=output))
    if share:
        second.mlp.register_forward_hook(lambda _m, _a, output: output + share * kept["mlp"])
    warned: list[str] = []
    tune_update(
        model,
        encoder_of(model),
        choose(model),
        harmful=from_values(HARMFUL),
        benign=from_values(BENIGN),
        config=TuningConfig(**{**QUICK, "layers": (1, None), "max_steps": 1}),
        warn=warned.append,
    )
    assert bool(warned) == (share > 0)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cuda", "cpu"])
def test_a_step_without_memory_is_taken_in_halves(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nest.tuning import loss

    whole, calls = loss.tuning_loss, []
    error = {
        "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    }[fault]

    def limited(logits: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(logits))
        if len(logits) > 40 and len(calls) > 4:
            raise error
        return whole(logits, *args, **kwargs)

    expected = tuned(build().double(), learning_rate=0.02)
    monkeypatch.setattr("nest.tuning.objective.tuning_loss", limited)
    with pytest.warns(UserWarning, match="out of memory: going on with"):
        result = tuned(build().double(), learning_rate=0.02)
    same_training(expected, result, 1e-4)
    assert result.patch.provenance["tuning"]["micro_batch_size"] < 16


def test_no_memory_for_a_single_dialogue_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_args: Any, **_kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("nest.tuning.objective.tuning_loss", never)
    model = build()
    before = state_of(model)
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(InputError, match=r"single dialogue.*--checkpointing"),
    ):
        tuned(model)
    assert same_bits(before, state_of(model))


def test_other_runtime_errors_are_not_taken_for_a_lack_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("nest.tuning.objective.tuning_loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        tuned(build())


def test_numbers_go_bad_after_good_steps_and_the_good_ones_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nest.tuning import loss

    whole = loss.tuning_loss
    steps: list[int] = []

    def poisoned(logits: Any, *args: Any, **kwargs: Any) -> Any:
        value = whole(logits, *args, **kwargs)
        if value.requires_grad:
            steps.append(1)
        return value * float("nan") if len(steps) > 9 else value

    monkeypatch.setattr("nest.tuning.objective.tuning_loss", poisoned)
    model = build()
    before = state_of(model)
    with pytest.raises(TuningStoppedError, match=r"at step 10 .*mlp.*step 8 was good") as raised:
        tuned(model)
    assert same_bits(before, state_of(model))
    result = raised.value.result
    assert result.best_step == 8
    monkeypatch.undo()
    good = tuned(build())
    assert [r.validation_loss for r in result.history] == [
        r.validation_loss for r in good.history[: len(result.history)]
    ]
    result.patch.fold_into(model)
    assert not same_bits(before, state_of(model))


def test_steps_since_the_last_validation_count_among_the_good_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nest.tuning import loss

    whole, steps = loss.tuning_loss, []

    def poisoned(logits: Any, *args: Any, **kwargs: Any) -> Any:
        value = whole(logits, *args, **kwargs)
        steps.extend([1] * value.requires_grad)
        return value * float("nan") if value.requires_grad and len(steps) > 6 else value

    monkeypatch.setattr("nest.tuning.objective.tuning_loss", poisoned)
    with pytest.raises(TuningStoppedError, match=r"at step 7 .*step 6 was good") as raised:
        tuned(build(), validate_every=25)
    assert [record.step for record in raised.value.result.history] == [0, 6]


def test_tuning_works_where_gradients_are_off() -> None:
    with torch.no_grad():
        result = tuned(build(), max_steps=4)
    assert result.best_step > 0


def test_weights_without_a_patch_are_refused_before_anything_is_trained() -> None:
    plain = build()
    with pytest.raises(SelectionError, match=r"mode='branch'\) and take update\.patch\(base="):
        tune_update(
            quantised(build()),
            encoder_of(plain),
            choose(plain),
            harmful=from_values(HARMFUL),
            benign=from_values(BENIGN),
            config=TuningConfig(**{**QUICK, "mode": "branch"}),
        )
