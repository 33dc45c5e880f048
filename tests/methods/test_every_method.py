"""Every method and control: one protocol, and none of them leaves a trace."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import BENIGN, HARMFUL, SAFE, UNSAFE, D, F, build, encoder_of, layout_of
from torch import Tensor, nn

from nest.errors import InputError
from nest.methods.circuit_breakers import CircuitBreakers
from nest.methods.full import Full
from nest.methods.lora import Lora
from nest.methods.makers import METHODS, knob_of, make_method, with_benign_weight, with_knob
from nest.methods.masks import Masks
from nest.methods.method import Method, MethodResult, Subject, TrainingData
from nest.methods.neurons import Neurons
from nest.methods.shira import Shira
from nest.methods.steering import Steering
from nest.models.layouts import find_sites
from nest.prompts.prompt_set import from_values
from nest.selection.config import SelectionConfig
from nest.tuning.config import TuningConfig
from nest.tuning.loop import TrainingLoop

pytest.importorskip("peft")
# Random models take no rate of the neurons' reliably: training then begins anew, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:the automatic learning rate:UserWarning")

SELECTING = SelectionConfig(neurons="20%", n_probe_seeds=1)
# Random models of this size do not take the whole automatic rate.
OURS = {"rate_factor": 0.3}
TUNING = TuningConfig(max_steps=4, batch_size=8, micro_batch_size=4, validate_every=2)
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "neurons": ("neurons", OURS),
    "shared": ("neurons", {**OURS, "update": "shared"}),
    "contrast": ("neurons", {**OURS, "scorer": "contrast"}),
    "probe": ("neurons", {**OURS, "scorer": "probe"}),
    "learned": ("neurons", {**OURS, "scorer": "learned"}),
    "separate": ("neurons", {**OURS, "separate": True}),
    "random neurons": ("neurons", {**OURS, "control": "random_neurons"}),
    "random clusters": ("neurons", {**OURS, "control": "random_clusters"}),
    "lowest": ("neurons", {**OURS, "control": "lowest"}),
    "shuffled labels": ("neurons", {**OURS, "control": "shuffled_labels", "scorer": "probe"}),
    "lora r1": ("lora", {"rank": 1}),
    "lora mlp": ("lora", {"rank": 2, "modules": "mlp", "alpha": 3.0}),
    "lora all": ("lora", {"rank": 2, "modules": "all"}),
    "lora matched": ("lora", {"parameters": "neurons"}),
    "lora of a number": ("lora", {"parameters": 300, "modules": "all"}),
    "lora on rows": ("lora", {"rank": 1, "rows": "selected"}),
    "shira": ("shira", {}),
    "shira matched": ("shira", {"parameters": "neurons"}),
    "masks": ("masks", {}),
    "full": ("full", {"learning_rate": 1e-3}),
    "circuit breakers": ("circuit_breakers", {"rank": 2}),
    "steering": ("steering", {}),
}
NAMES = pytest.mark.parametrize("name", SETTINGS)
UNTRAINED = ("steering",)


def made(name: str, seed: int = 0, **values: Any) -> Method:
    kind, own = SETTINGS[name]
    return make_method(
        kind, {**own, **values}, name=name, tuning=TUNING, selecting=SELECTING, seed=seed
    )


def subject_of(family: str = "qwen3") -> Subject:
    model = build(family)
    return Subject(model, encoder_of(model), find_sites(model, layout_of(family)))


@pytest.fixture
def subject() -> Subject:
    return subject_of()


@pytest.fixture(scope="module")
def data() -> TrainingData:
    complying = [(prompt, "sure here you go mix stir well done") for prompt in UNSAFE]
    return TrainingData(
        harmful=from_values(HARMFUL, "harmful"),
        benign=from_values(BENIGN, "benign"),
        unsafe=from_values(UNSAFE, "unsafe"),
        safe=from_values(SAFE, "safe"),
        complying=from_values(complying, "complying"),
    )


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(7, 19).view(2, 6)
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def outcome(
    method: Method, subject: Subject, data: TrainingData, watch: Any = None
) -> tuple[Tensor, MethodResult]:
    with method.applied(subject, data, watch=watch) as treated:
        return logits(treated.model), treated.result


@contextmanager
def nothing_left(model: nn.Module) -> Iterator[None]:
    """Weights, flags, modes, gradients, modules, hooks and random numbers are what they were."""

    def seen() -> dict[str, Any]:
        modules = dict(model.named_modules())
        return {
            "modules": [(path, id(module)) for path, module in modules.items()],
            "attributes": sorted(vars(model)),
            "modes": [module.training for module in modules.values()],
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules.values()],
            "forwards": ["forward" in vars(module) for module in modules.values()],
            "flags": [parameter.requires_grad for parameter in model.parameters()],
        }

    model.get_submodule("model.layers.1").train()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    next(iter(model.children())).requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before, generator = seen(), torch.get_rng_state()
    yield
    assert seen() == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert first.grad is not None and bool((first.grad == 1).all())


@NAMES
def test_it_changes_the_model_inside_its_block_only(
    name: str, subject: Subject, data: TrainingData
) -> None:
    method = made(name)
    assert isinstance(method, Method) and method.name == name
    model = subject.model
    untreated, untouched = logits(model), copy.deepcopy(model)
    with nothing_left(model), method.applied(subject, data) as treated:
        found, changed, result = logits(treated.model), treated.changed(), treated.result
        assert not torch.equal(found, untreated)
    assert torch.equal(logits(model), untreated)
    assert result.seconds >= result.training_seconds >= 0
    if name in UNTRAINED:
        assert changed is None and result.trainable_parameters == 0
        return
    assert changed
    state = untouched.state_dict()
    for weight, value in changed.items():
        assert value.dtype == state[weight].dtype and not torch.equal(value, state[weight])
        state[weight].copy_(value)
    # An adapter beside a weight and one inside it round differently.
    torch.testing.assert_close(logits(untouched), found, rtol=1e-4, atol=1e-4)


@NAMES
def test_an_exception_leaves_no_trace_either(
    name: str, subject: Subject, data: TrainingData
) -> None:
    method = made(name)
    with (
        nothing_left(subject.model),
        pytest.raises(ZeroDivisionError),
        method.applied(subject, data),
    ):
        raise ZeroDivisionError

    def fails(_model: nn.Module, step: int, _seconds: float) -> None:
        if step == 1:
            raise ZeroDivisionError

    with (
        nothing_left(subject.model),
        pytest.raises(ZeroDivisionError),
        method.applied(subject, data, watch=fails),
    ):
        raise AssertionError("the watch's exception was lost")


@NAMES
def test_watching_changes_nothing_and_costs_nothing(
    name: str, subject: Subject, data: TrainingData
) -> None:
    untreated = logits(subject.model)
    expected, result = outcome(made(name), subject, data)
    steps: list[int] = []
    clock: list[float] = []
    shown: list[Tensor] = []

    def watch(model: nn.Module, step: int, seconds: float) -> None:
        assert not any(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
        steps.append(step)
        clock.append(seconds)
        shown.append(logits(model))
        torch.rand(3), random.random(), np.random.rand()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model(input_ids=torch.arange(7, 19).view(2, 6)).logits.sum().backward()
        model.train()
        time.sleep(0.02)

    started = time.monotonic()
    found, watched = outcome(made(name), subject, data, watch)
    wall = time.monotonic() - started
    assert torch.equal(found, expected)
    assert watched.history == result.history and watched.best_step == result.best_step
    assert steps == list(range(len(steps))) and len(steps) == (2 if name in UNTRAINED else 5)
    assert torch.equal(shown[0], untreated) and not torch.equal(shown[-1], untreated)
    assert clock == sorted(clock) and clock[0] < 0.02
    assert clock[-1] <= watched.seconds <= wall - 0.02 * len(steps) + 0.02
    assert watched.training_seconds <= watched.seconds


@NAMES
def test_what_is_trained_is_what_it_says(
    name: str, subject: Subject, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number that ever gets a gradient counts, and no other."""
    moved: list[Tensor] = []
    own = TrainingLoop._check_finite

    def spy(loop: TrainingLoop, *args: Any) -> None:
        for i, parameter in enumerate(loop.update.parameters()):
            assert parameter.grad is not None
            # Words that no dialogue has: their embeddings are trained and have nothing to learn.
            seen = torch.ones_like(parameter) if name == "full" else parameter.grad != 0
            if i < len(moved) and moved[i].shape != seen.shape:
                moved.clear()  # what neurons were learned by is another update
            moved[i:] = [moved[i] | seen.bool() if i < len(moved) else seen.bool(), *moved[i + 1 :]]
        own(loop, *args)

    monkeypatch.setattr(TrainingLoop, "_check_finite", spy)
    _, result = outcome(made(name), subject, data)
    assert sum(int(one.sum()) for one in moved) == result.trainable_parameters


@NAMES
def test_the_same_seed_gives_the_same(name: str, subject: Subject, data: TrainingData) -> None:
    first, _ = outcome(made(name), subject, data)
    torch.manual_seed(5)
    again, _ = outcome(made(name), subject, data)
    assert torch.equal(first, again)
    other, _ = outcome(made(name, seed=1), subject, data)
    assert name in UNTRAINED or not torch.equal(first, other)


@NAMES
def test_its_knob_and_its_weight_on_benign_answers_have_effect(
    name: str, subject: Subject, data: TrainingData
) -> None:
    method = made(name)
    first, _ = outcome(method, subject, data)
    assert len(method.tried) == 4 and sorted(method.tried) == list(method.tried)
    low = with_knob(method, method.tried[0])
    assert knob_of(low) == method.tried[0] != knob_of(method) and low.name == method.name
    assert not torch.equal(outcome(low, subject, data)[0], first)
    bold = with_benign_weight(method, 0.3)
    assert bold.name == method.name
    assert not torch.equal(outcome(bold, subject, data)[0], first)
    with pytest.raises(InputError, match="must be positive"):
        with_benign_weight(method, 0.0)


@NAMES
def test_weight_on_benign_answers_keeps_them(
    name: str, subject: Subject, data: TrainingData
) -> None:
    """A hundredfold weight leaves benign answers nearer to what they were."""

    def drift(method: Method) -> float:
        ids = torch.tensor([subject.encoder.prompt(prompt) for prompt in SAFE[::9]][:2])
        with torch.no_grad():
            base = subject.model(input_ids=ids).logits.log_softmax(-1)
            with method.applied(subject, data) as treated:
                own = treated.model(input_ids=ids).logits.log_softmax(-1)
        return float((base.exp() * (base - own)).sum(-1).mean())

    method: Any = made(name)
    if name not in UNTRAINED:
        long = replace(TUNING, max_steps=12, benign_weight=0.0, kl_weight=0.1)
        method = replace(method, tuning=long)
    assert drift(with_benign_weight(method, 100.0)) < drift(method)


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
@NAMES
def test_fused_and_transposed_projections_work_too(
    name: str, family: str, data: TrainingData
) -> None:
    subject, method = subject_of(family), made(name)
    if hasattr(method, "selecting"):  # on random models a probe may tell nothing apart
        changed_one: Any = method
        method = replace(changed_one, selecting=replace(SELECTING, scorer="contrast"))
        if getattr(method, "scorer", None) == "probe":
            method = replace(changed_one, scorer="contrast")
    if family == "gpt2" and isinstance(method, Shira):
        with pytest.raises(InputError, match=r"adapts nn.Linear alone, and transformer\.h\.0"):
            outcome(method, subject, data)
        return
    untouched = copy.deepcopy(subject.model)
    with method.applied(subject, data) as treated:
        found, changed = logits(treated.model), treated.changed()
    if changed is not None:
        for weight, value in changed.items():
            untouched.state_dict()[weight].copy_(value)
        torch.testing.assert_close(logits(untouched), found, rtol=1e-4, atol=1e-4)


# --- sizes ----------------------------------------------------------------------------------------


def test_sizes_are_the_neurons(subject: Subject, data: TrainingData) -> None:
    def size(name: str) -> int:
        return outcome(made(name), subject, data)[1].trainable_parameters

    ours = size("neurons")
    assert ours == size("random neurons") == size("random clusters")
    assert ours == size("lowest")
    assert size("probe") == size("shuffled labels")
    more = outcome(made("separate"), subject, data)[1]
    assert more.trainable_parameters == D * more.more["neurons"]
    for name in ("lora matched", "shira matched"):
        assert abs(size(name) - ours) <= (D + F) / 2 and size(name) <= 1.1 * ours
    assert size("masks") == 4 * F
    assert size("full") == sum(parameter.numel() for parameter in subject.model.parameters())


def test_lora_on_rows_writes_no_other(subject: Subject, data: TrainingData) -> None:
    with made("neurons").applied(subject, data) as treated:
        ours = treated.changed() or {}
    with made("lora on rows").applied(subject, data) as treated:
        theirs = treated.changed() or {}
    state = subject.model.state_dict()
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        rows = (value != state[name]).any(dim=1)
        assert torch.equal(rows, (ours[name] != state[name]).any(dim=1))


def test_lora_can_be_too_large(subject: Subject, data: TrainingData) -> None:
    for kind in ("lora", "shira"):
        with pytest.raises(InputError, match=f"`{kind}` cannot be as small as 20 parameters: on"):
            outcome(
                make_method(
                    kind,
                    {"parameters": 20},
                    name=kind,
                    tuning=TUNING,
                    selecting=SELECTING,
                    seed=0,
                ),
                subject,
                data,
            )


# --- settings and data ----------------------------------------------------------------------------


def test_unknown_names_are_told_with_what_there_is() -> None:
    def make(kind: str, **values: Any) -> Method:
        return make_method(kind, values, name="x", tuning=TUNING, selecting=SELECTING, seed=3)

    with pytest.raises(InputError, match="no method 'lorra'; there are neurons, lora, full"):
        make("lorra")
    with pytest.raises(InputError, match="lora has no setting 'rang'; did you mean rank"):
        make("lora", rang=3)
    with pytest.raises(InputError, match="lora has no setting 'tuning'"):
        make("lora", tuning=TUNING)
    with pytest.raises(InputError, match="the method lora: rank is 0; it must be at least 1"):
        make("lora", rank=0)
    with pytest.raises(InputError, match="a row of its own needs no loading"):
        make("neurons", separate=True, update="loaded")
    assert make("neurons").tuning.seed == 3 and set(METHODS) == {k for k, _ in SETTINGS.values()}


@pytest.mark.parametrize("kind", [Lora, Full, CircuitBreakers, Shira, Masks])
def test_a_learning_rate_stands_in_one_place(kind: Any) -> None:
    with pytest.raises(InputError, match="the method has one of its own; leave it out"):
        kind(tuning=TuningConfig(learning_rate=0.1))
    ours = Neurons(tuning=TuningConfig(learning_rate=0.1))
    assert with_knob(ours, 3.4).tuning.learning_rate is None


@pytest.mark.parametrize("name", ["neurons", "lora matched", "lora on rows", "steering"])
def test_prompts_that_are_missing_are_asked_for(
    name: str, subject: Subject, data: TrainingData
) -> None:
    alone = TrainingData(data.harmful, data.benign)
    with pytest.raises(InputError, match=f"the method `{name}` needs unsafe and safe prompts to"):
        outcome(made(name), subject, alone)


def test_circuit_breakers_say_what_they_learned_from(subject: Subject, data: TrainingData) -> None:
    _, result = outcome(made("circuit breakers"), subject, data)
    assert result.more["rerouted"] == "harmful prompts with complying answers"
    _, result = outcome(made("circuit breakers"), subject, replace(data, complying=None))
    assert "there are no complying answers" in result.more["rerouted"]
    assert result.best_step == result.steps == 4  # the last one is kept


def test_steering_says_where(subject: Subject, data: TrainingData) -> None:
    _, result = outcome(Steering(tuning=TUNING), subject, data)
    losses = result.more["losses"]
    assert len(losses) == 2 and losses[result.more["layer"]] == min(losses)


@pytest.mark.parametrize(("name", "rate"), [("shared", 1e4), ("lora r1", 100.0), ("full", 10.0)])
def test_where_no_step_is_better_than_none_the_model_is_as_it_was(
    name: str, rate: float, subject: Subject, data: TrainingData
) -> None:
    method: Any = made(name)
    if name == "shared":
        method = replace(method, tuning=replace(method.tuning, learning_rate=rate))
    else:
        method = with_knob(method, rate)
    before = logits(subject.model)
    with nothing_left(subject.model), method.applied(subject, data) as treated:
        assert torch.equal(logits(treated.model), before)
        result, changed = treated.result, treated.changed()
    assert (result.best_step, result.steps) == (0, 4)
    assert result.trainable_parameters > 0 and len(result.history) > 1
    assert changed is not None
    state = subject.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in changed.items())
