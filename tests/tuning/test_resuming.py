"""A tuning that goes on from a checkpoint ends with the bytes of one that was never interrupted.

With duplicates among the dialogues, any size of micro-batches, with and without cached layers, KL and
room to keep what the base model says.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BENIGN, HARMFUL, build, choose, word_tokenizer

import nest
from nest.errors import ActivationError, InputError
from nest.tuning import objective, tune
from nest.tuning.loss import BasePredictions
from nest.tuning.prefix import FrozenPrefix

SEEDS = 20
Case = dict[str, Any]


def case(seed: int) -> tuple[Case, int]:
    """Settings of a tuning, and a bound in bytes for what is kept of the base model's predictions."""
    rng = random.Random(seed)
    harmful = [rng.choice(HARMFUL) for _ in range(rng.randint(8, 16))]
    benign = [rng.choice(BENIGN) for _ in range(rng.randint(8, 20))]
    settings = {
        "harmful": [*harmful, *harmful[:3]],
        "benign": [*benign, *benign[:4]],
        "batch_size": rng.choice([3, 5, 8, 16]),
        "micro_batch_size": rng.choice([2, 3, 8]),
        "epochs": 4.0,
        "max_steps": rng.choice([7, 9, 12]),
        "validate_every": rng.choice([1, 2, 4]),
        "validation": 0.2,
        "kl_weight": rng.choice([0.0, 1.0, 1.0, 1.0]),
        "layers": rng.choice([None, (1, None), (1, None)]),
        "update": rng.choice(["shared", "loaded"]),
        "learning_rate": 0.02,
        "seed": seed,
    }
    return settings, rng.choice([2**29, 4_000, 20_000, 0])


def ended(model: Any, stop_at: int | None = None, **settings: Any) -> str:
    """What a tuning comes to, to the bit; a progress callback interrupts it after a step."""

    def progress(stage: str, done: int, _total: int) -> None:
        if stage == "tune" and done == stop_at:
            raise KeyboardInterrupt

    result = nest.tune_result(
        model, word_tokenizer(), choose(model), progress=progress, checkpoint_every="1", **settings
    )
    tensors = {**result.patch.vectors, **(result.patch.loadings or {})}
    return json.dumps(
        [result.patch.provenance["tuning"]["history"], {k: v.tolist() for k, v in tensors.items()}]
    )


@pytest.fixture
def model() -> Any:
    return build()


def outcomes(model: Any, seed: int, work: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of an undisturbed run, and of one that was interrupted at two steps."""
    settings, bound = case(seed)
    monkeypatch.setattr(objective, "BasePredictions", partial(BasePredictions, bound_bytes=bound))
    undisturbed = ended(model, **settings)
    for step in sorted(random.Random(seed).sample(range(1, settings["max_steps"]), 2)):
        with pytest.raises(KeyboardInterrupt):
            ended(model, step, work=work, **settings)
    return [undisturbed, ended(model, work=work, **settings)]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_to_the_last_bit(
    model: Any, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, resumed = outcomes(model, seed, tmp_path / "w", monkeypatch)
    assert undisturbed == resumed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("forgotten", ["prefix", "base"])
def test_the_company_of_each_dialogue_matters(
    model: Any, forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it some of these runs end with other bytes, or what the test above asserts is nothing."""
    if forgotten == "prefix":
        monkeypatch.setattr(FrozenPrefix, "met", lambda *_: None)
    else:
        monkeypatch.setattr(BasePredictions, "met", lambda *_: ())
    pairs = (outcomes(model, seed, tmp_path / "w", monkeypatch) for seed in range(2 * SEEDS))
    assert any(undisturbed != resumed for undisturbed, resumed in pairs)


def test_memory_that_ran_out_before_is_remembered(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that goes on takes as many dialogues a forward pass as the interrupted one did."""
    settings, _ = case(1)
    settings |= {"micro_batch_size": 8, "batch_size": 16, "layers": None, "kl_weight": 1.0}
    real, sizes = tune.target_logits, []

    def scarce(model: Any, batch: Any, device: torch.device) -> Any:
        sizes.append(len(batch.indices))
        if len(batch.indices) > limit:
            raise MemoryError("x")
        return real(model, batch, device)

    monkeypatch.setattr(tune, "target_logits", scarce)
    limit = 5
    undisturbed = ended(model, warn=lambda _: None, **settings)
    with pytest.raises(KeyboardInterrupt):
        ended(model, 4, work=tmp_path / "w", warn=lambda _: None, **settings)
    limit = 10**6  # now there is room, and yet
    sizes.clear()
    assert ended(model, work=tmp_path / "w", **settings) == undisturbed
    assert max(sizes) <= 5


# --- an automatic rate that is too high ---------------------------------------------------------------


def test_a_quarter_of_a_rate_that_diverges_is_tried_and_gone_on_with(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, _ = case(1)
    settings |= {"learning_rate": None, "validate_every": 1, "max_steps": 8, "update": "shared"}
    monkeypatch.setattr(tune, "STEP_SHARES", {"zero_vectors": 500.0})
    told: list[str] = []
    result = nest.tune_result(
        model, word_tokenizer(), choose(model), warn=told.append, checkpoint_every="1", **settings
    )
    record = result.patch.provenance["tuning"]
    assert len(told) == len(record["rates_too_high"]) == 2
    assert "is too high" in told[0] and "beginning anew with" in told[0]
    ratio = record["rates_too_high"][0] / record["config"]["learning_rate"]
    assert ratio == pytest.approx(4.0 ** len(told))
    assert result.best_step > 0

    undisturbed = ended(model, warn=lambda _: None, **settings)
    steps: list[int] = []

    def progress(stage: str, done: int, _total: int) -> None:
        if stage == "tune":
            steps.append(done)
            if len(told) > 1 + len(record["rates_too_high"]) and done == 2:
                raise KeyboardInterrupt

    # interrupted in the second try, after the first has given up
    with pytest.raises(KeyboardInterrupt):
        nest.tune_result(
            model,
            word_tokenizer(),
            choose(model),
            warn=lambda text: told.extend([text, text]),
            progress=progress,
            checkpoint_every="1",
            work=tmp_path / "w",
            **settings,
        )
    again: list[str] = []
    assert ended(model, work=tmp_path / "w", warn=again.append, **settings) == undisturbed
    assert len(again) == len(record["rates_too_high"]) - 1


def test_the_users_own_rate_is_the_only_one(model: Any) -> None:
    settings, _ = case(1)
    told: list[str] = []
    with pytest.raises(InputError, match=r"try a learning rate of 2\.5e\+03 or less"):
        nest.tune_result(
            model,
            word_tokenizer(),
            choose(model),
            warn=told.append,
            **settings | {"learning_rate": 1e4, "clip": 0.0, "update": "shared"},
        )
    assert told == []


@pytest.mark.parametrize("kind", ["not finite", "a spike"])
def test_a_run_that_went_back_goes_on_to_the_same_bytes(
    kind: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the rate that would be measured now is another."""
    settings, _ = case(1)
    settings |= {"learning_rate": None, "validate_every": 2, "max_steps": 14, "epochs": 9.0}
    real_check, real_record = tune.TrainingLoop._check_finite, tune.TrainingLoop._record

    def check(loop: Any, loss: float, step: int) -> None:
        if kind == "not finite" and step == 6 and not loop.backed_off:
            raise ActivationError("not finite")
        real_check(loop, loss, step)

    def record(loop: Any, step: int, *args: Any) -> None:
        real_record(loop, step, *args)
        if kind == "a spike" and step == 6 and not loop.backed_off:
            loop.history[-1] = replace(loop.history[-1], validation_loss=1e3)

    monkeypatch.setattr(tune.TrainingLoop, "_check_finite", check)
    monkeypatch.setattr(tune.TrainingLoop, "_record", record)
    told: list[str] = []
    undisturbed = ended(model, warn=told.append, **settings)
    assert "going on from step" in told[0]
    last = json.loads(undisturbed)[0][-1]
    assert last["step"] == 14 and last["learning_rate"] == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(KeyboardInterrupt):
        ended(model, 9, work=tmp_path / "w", warn=told.append, **settings)
    measured = tune.output_share
    monkeypatch.setattr(tune, "output_share", lambda *args: 1.01 * measured(*args))
    assert ended(model, work=tmp_path / "w", warn=told.append, **settings) == undisturbed
