"""Every method on the embedded organism: it learns what it is there for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nest
from nest.conversations.encoders import ChatEncoder
from nest.methods.makers import make_method
from nest.methods.method import Subject, TrainingData
from nest.models.layouts import find_sites
from nest.prompts.prompt_set import load_prompts
from nest.selection.config import SelectionConfig
from nest.tuning.config import TuningConfig

SHORT = TuningConfig(max_steps=20, batch_size=16)
SELECTING = SelectionConfig(z_threshold=1.5)


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


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("neurons", {}),
        ("neurons", {"control": "random_neurons"}),
        ("neurons", {"separate": True}),
        ("lora", {"rank": 1}),
        ("lora", {"parameters": "neurons"}),
        ("lora", {"rank": 1, "rows": "selected"}),
        ("shira", {}),
        ("masks", {}),
        ("full", {}),
    ],
)
def test_a_method_lowers_the_validation_loss(
    kind: str, values: dict[str, Any], subject: Subject, data: TrainingData
) -> None:
    if kind != "neurons":
        pytest.importorskip("peft")
    method = make_method(kind, values, name=kind, tuning=SHORT, selecting=SELECTING, seed=0)
    seen: list[str] = []
    with method.applied(
        subject, data, progress=lambda stage, _done, _total: seen.append(stage)
    ) as treated:
        result = treated.result
    assert 0 < result.best_step <= result.steps == 20
    losses = [record.validation_loss for record in result.history]
    assert min(losses) < losses[0]
    assert "tune" in seen


def test_lora_matches_the_neurons_in_size(subject: Subject, data: TrainingData) -> None:
    pytest.importorskip("peft")

    def size(kind: str, **values: Any) -> int:
        method = make_method(kind, values, name=kind, tuning=SHORT, selecting=SELECTING, seed=0)
        with method.applied(subject, data) as treated:
            return treated.result.trainable_parameters

    ours, wide = size("neurons"), 128 + 384
    assert abs(size("lora", parameters="neurons") - ours) <= wide / 2
    assert abs(size("shira", parameters="neurons") - ours) <= wide / 2
    assert size("lora", rank=2) == 2 * 8 * wide
