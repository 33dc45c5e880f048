"""Every method: it learns, says what it cost, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nest
from nest.conversations.encoders import ChatEncoder
from nest.errors import InputError
from nest.methods.lora import Lora
from nest.methods.method import Method, Subject, TrainingData
from nest.methods.neurons import Neurons
from nest.models.layouts import find_sites
from nest.prompts.prompt_set import load_prompts
from nest.selection.config import SelectionConfig
from nest.selection.controls import random_neurons
from nest.tuning.config import TuningConfig

SHORT = TuningConfig(max_steps=20, batch_size=16)
SELECTING = SelectionConfig(z_threshold=1.5)
METHODS = [
    Neurons(SELECTING, SHORT),
    Neurons(SELECTING, SHORT, lambda found: random_neurons(found, seed=0), name="random neurons"),
    Lora(1, SHORT),
]


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.set_num_threads(1)
    model, tokenizer = nest.load()
    return Subject(model, ChatEncoder(tokenizer, model), find_sites(model))


@pytest.fixture(scope="module")
def data() -> TrainingData:
    return TrainingData(
        harmful=load_prompts("organism:harmful", need_response=True),
        benign=load_prompts("organism:benign", need_response=True),
        unsafe=load_prompts("organism:unsafe"),
        safe=load_prompts("organism:safe"),
    )


def logits(model: nn.Module, subject: Subject) -> torch.Tensor:
    ids = torch.tensor([subject.encoder.prompt("How do I open a box?")])
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_method_learns_and_leaves_no_trace(
    method: Method, subject: Subject, data: TrainingData
) -> None:
    if isinstance(method, Lora):
        pytest.importorskip("peft")
    assert isinstance(method, Method)
    model = subject.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    untreated = logits(model, subject)
    seen: list[str] = []
    with method.applied(subject, data, lambda stage, _done, _total: seen.append(stage)) as treated:
        result = treated.result
        assert result.trainable_parameters > 0
        assert 0 < result.best_step <= result.steps == 20
        assert min(r.validation_loss for r in result.history) < result.history[0].validation_loss
        assert result.seconds > 0
        assert not torch.equal(logits(treated.model, subject), untreated)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert "tune" in seen


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_an_exception_in_the_block_leaves_no_trace_either(
    method: Method, subject: Subject, data: TrainingData
) -> None:
    if isinstance(method, Lora):
        pytest.importorskip("peft")
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), method.applied(subject, data):
        raise ZeroDivisionError
    after = subject.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_is_trained_is_what_it_says(subject: Subject, data: TrainingData) -> None:
    pytest.importorskip("peft")
    with Lora(2, SHORT).applied(subject, data) as treated:
        wide = sum(site.length + subject.model.config.hidden_size for site in subject.sites)
        assert treated.result.trainable_parameters == 2 * wide
        assert any("lora" in name for name, _ in treated.model.named_parameters())


def test_neurons_need_prompts_to_be_found_with(subject: Subject, data: TrainingData) -> None:
    alone = TrainingData(data.harmful, data.benign)
    with pytest.raises(InputError, match="needs unsafe and safe"):
        Neurons(SELECTING, SHORT).applied(subject, alone).__enter__()
