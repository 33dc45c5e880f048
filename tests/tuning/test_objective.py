"""The loop minimises whatever objective it is given, and keeps the step that it says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from tiny_models import BENIGN, HARMFUL, build, choose, encoder_of
from torch import Tensor

from nest.prompts.prompt_set import from_values
from nest.tuning.config import TuningConfig
from nest.tuning.dialogues import MicroBatch, prepare
from nest.tuning.loop import TrainingLoop
from nest.tuning.objective import Keeps, Objective
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.update import ClusterUpdate, trainable


class _Rising(Objective):
    """Its validation loss is higher after every step."""

    def __init__(self, update: ClusterUpdate, keeps: Keeps) -> None:
        self._update, self._keeps = update, keeps
        self.steps: list[tuple[int, bool]] = []

    @property
    def keeps(self) -> Keeps:
        return self._keeps

    def losses(self, micro_batches: Sequence[MicroBatch], step: int) -> Iterator[Tensor]:
        self.steps.append((step, torch.is_grad_enabled()))
        for _ in micro_batches:
            yield step + (self._update.packed - 3.0).square().mean() / len(micro_batches)


@pytest.mark.parametrize(("keeps", "kept"), [("best", 0), ("last", 4)])
def test_the_step_that_is_kept(keeps: Keeps, kept: int) -> None:
    model = build()
    encoder = encoder_of(model)
    config = TuningConfig(max_steps=4, batch_size=8, micro_batch_size=2, validate_every=2)
    train, validation, n_steps = prepare(encoder, from_values(HARMFUL), from_values(BENIGN), config)
    shown: list[Tensor] = []
    with trainable(model, choose(model)) as update:
        start = update.packed.detach().clone()
        objective = _Rising(update, keeps)

        def after_step() -> float:
            shown.append(update.packed.detach().clone())
            return 1000.0

        loop = TrainingLoop(
            encoder,
            update,
            NeuronAdamW(update, lr=0.1),
            objective,
            config,
            n_steps,
            micro_batch_size=2,
            after_step=after_step,
        )
        loop.run(train, validation)
        assert loop.best_step == kept
        assert torch.equal(update.packed, shown[-1] if kept else start)
    assert objective.steps == [
        *[(0, False), (0, True), (1, True), (2, False), (2, True), (3, True), (4, False)]
    ]
    assert len(shown) == 4 and loop.seconds < 0  # what it took is none of the loop's
