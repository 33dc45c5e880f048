"""accelerate prepares model, optimizer and batches as it does any, and trains the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    BATCH,
    RATE,
    Step,
    assert_close,
    collate,
    examples,
    grouped,
    plain,
    token_losses,
    watched,
)
from tiny_models import build, choose
from torch import nn

from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.update import ClusterUpdate, trainable

pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate import Accelerator

STEPS = 8


def ours(update: ClusterUpdate) -> torch.optim.Optimizer:
    return NeuronAdamW(update, lr=RATE)


def torchs(update: ClusterUpdate) -> torch.optim.Optimizer:
    return torch.optim.AdamW(update.parameters(), lr=RATE, weight_decay=0.0, fused=True)


def loader() -> torch.utils.data.DataLoader[Any]:
    data: Any = examples()
    return torch.utils.data.DataLoader(data, batch_size=BATCH, collate_fn=collate)


def means(model: nn.Module, passes: Any) -> Iterator[torch.Tensor]:
    """The mean of the passes' own means, which is what accelerate accumulates."""
    for step in passes:
        yield token_losses(model, step.batch).mean() / len(passes)


def train(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, data: Any, passes: int
) -> list[Step]:
    seen: list[Step] = []
    while len(seen) < passes:
        for batch in data:
            with accelerator.accumulate(model):
                seen.append(Step(dict(batch), torch.get_rng_state()))
                with accelerator.autocast():
                    loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1e6)
                optimizer.step()
                optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(("make", "same"), [(ours, torchs), (torchs, ours)], ids=["ours", "torch"])
def test_it_trains_as_a_plain_loop(
    make: Callable[[ClusterUpdate], Any],
    same: Callable[[ClusterUpdate], Any],
    accumulated: int,
    precision: str,
    tmp_path: Path,
) -> None:
    accelerator = Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulated
    )
    model = build()
    with watched(model) as (update, finish):
        prepared, optimizer, data = accelerator.prepare(model, make(update), loader())
        seen = train(accelerator, prepared, optimizer, data, STEPS * accumulated)
        accelerator.save_model(prepared, tmp_path)
        done = finish(tmp_path)
    assert done.after < done.before
    steps = grouped(seen, accumulated)
    assert_close(
        done.packed, plain(steps, optimizer=same, loss=means, autocast=precision == "bf16")
    )


def test_a_saved_state_goes_on(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = build()
    with trainable(model, choose(model)) as update:
        parts = accelerator.prepare(model, ours(update), loader())
        train(accelerator, *parts, 4)
        accelerator.save_state(str(tmp_path), safe_serialization=True)
        train(accelerator, *parts, 4)
        whole = update.patch()

    alone_again = Accelerator(cpu=True)
    model = build()
    with watched(model) as (update, finish):
        parts = alone_again.prepare(model, ours(update), loader())
        alone_again.load_state(str(tmp_path))
        train(alone_again, *parts, 4)
        again = finish(None).patch
    for group, values in whole.vectors.items():
        assert torch.equal(again.vectors[group], values)
