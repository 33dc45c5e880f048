"""The loss of circuit breakers against one by hand, and its schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, get_args

import pytest
import torch
from tiny_models import BENIGN, HARMFUL, SAFE, UNSAFE, build, encoder_of
from torch import Tensor, nn

from nest.activations.taps import ResidualTap
from nest.methods.adapters import adapted
from nest.methods.circuit_breakers import (
    CircuitBreakers,
    Rerouting,
    Tokens,
    coefficients,
    median_norm,
    rerouting,
    retaining,
    target_layers,
)
from nest.methods.method import Subject, TrainingData
from nest.methods.places import linear_modules
from nest.models.layouts import find_sites
from nest.prompts.prompt_set import from_values
from nest.tuning.config import TuningConfig
from nest.tuning.dialogues import Example, MicroBatch
from nest.tuning.loop import TrainingLoop

PAPER = (10 / 32, 20 / 32)


def test_both_terms_of_a_token() -> None:
    reference = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    states = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [0.0, 5.0]])
    expected = [5.0, 1.0, 2.0, math.sqrt(29.0)]
    torch.testing.assert_close(retaining(reference, states), torch.tensor(expected))
    expected = [0.0, math.sqrt(0.5), 0.0, 0.0]
    torch.testing.assert_close(rerouting(reference, states), torch.tensor(expected))


def test_the_distance_has_a_gradient_where_it_is_zero() -> None:
    states = torch.ones(2, 3, requires_grad=True)
    retaining(torch.ones(2, 3), states).sum().backward()
    assert states.grad is not None and bool((states.grad == 0).all())


def test_coefficients() -> None:
    assert coefficients(0, 100, 10.0) == (0.0, 10.0)
    assert coefficients(50, 100, 10.0) == (2.5, 7.5)
    assert coefficients(100, 100, 10.0) == (5.0, 5.0)
    assert min(min(coefficients(step, 7, 1.0)) for step in range(1000)) >= 0


def test_targets_are_the_papers() -> None:
    assert target_layers(32, PAPER) == (9, 19)
    assert target_layers(4, PAPER) == (0, 1)
    assert target_layers(1, PAPER) == (0,)


class _Table(nn.Module):
    """Two blocks that give a token's row of a table, times what the block has learned."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
        self.model = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.turn = nn.Parameter(torch.eye(2))
        self.is_on = True

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.rows[input_ids] @ (self.turn if self.is_on else torch.eye(2))
        states = self.model[0](states)
        return self.model[1](2 * states)


class _Off:
    def __init__(self, model: _Table) -> None:
        self.model = model

    def removed(self) -> Any:
        self.model.is_on = False

        class On(nullcontext):  # type: ignore[type-arg]
            def __exit__(this, *_: object) -> None:
                self.model.is_on = True

        return On()

    def parameters(self) -> list[nn.Parameter]:
        return [self.model.turn]

    def gradients(self) -> dict[str, Tensor]:
        return {}

    def snapshot(self) -> list[Tensor]:
        return []

    def load_snapshot(self, values: Sequence[Tensor]) -> None: ...


@pytest.mark.parametrize("size", [1, 3])
def test_the_loss_of_a_batch_by_hand(size: int) -> None:
    """Means over a kind's own tokens, padding left out, however the batch is cut up."""
    model = _Table()
    model.turn.data = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # swaps both numbers
    taps = [ResidualTap(i, f"model.{i}", 2) for i in range(2)]
    objective = Rerouting(
        Subject(model, encoder_of(build()), ()),
        _Off(model),
        taps,
        n_steps=10,
        tokens="all",
        strength=10.0,
        retain_weight=3.0,
    )
    # Norms of 1 and 5, twice that in block 1; of both in the middle the lower.
    assert median_norm(model, taps, [Example((2, 1), 1, benign=True)] * 3, 0) == 2.0
    examples = [
        Example((1, 2, 2), 1, benign=True),
        Example((2, 1), 1, benign=False),
        Example((3, 3, 1), 1, benign=False),
    ]
    batches = [MicroBatch.of(examples[i : i + size], 0) for i in range(0, 3, size)]
    found = sum(float(part.detach()) for part in objective.losses(batches, 5))
    # A token's distance: |(3, 4) - (4, 3)| and |(1, 0) - (0, 1)|, both of them sqrt 2; twice in block 1.
    retain = (math.sqrt(2) + 2 * math.sqrt(2)) / 2
    # Cosines: (3, 4) and (4, 3) 24/25; (1, 0) and (0, 2) turned away. Two of five tokens are (3, 4).
    reroute = (2 * 24 / 25) / 5
    assert found == pytest.approx(2.5 * 3.0 * retain + 7.5 * reroute)


def test_refusals_are_retained_where_complying_answers_are_turned() -> None:
    """The same prompt with both answers: nothing of it is both."""
    model = _Table()
    subject = Subject(model, encoder_of(build()), ())
    benign, refusal = Example((1, 2, 2), 1, benign=True), Example((1, 2, 3), 2, benign=True)
    complying = Example((1, 2, 1), 2, benign=False)
    batch = MicroBatch.of([benign, refusal, complying], 0)
    yes, no = [True] * 3, [False] * 3
    expected = {
        "all": ([yes, yes, no], [no, no, yes]),
        "answers": ([yes, [False, False, True], no], [no, no, [False, False, True]]),
    }
    for tokens in get_args(Tokens):
        objective = Rerouting(
            subject,
            _Off(model),
            [ResidualTap(0, "model.0", 2)],
            n_steps=1,
            tokens=tokens,
            strength=1.0,
            retain_weight=1.0,
            refusals={refusal},
        )
        retained, rerouted = objective._masks(batch)
        assert (retained.tolist(), rerouted.tolist()) == expected[tokens]


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_noise_of_a_share_of_each_weight(family: str) -> None:
    peft = pytest.importorskip("peft")
    model = build(family)
    paths = list(linear_modules(Subject(model, encoder_of(model), ()), "all", "x"))
    shape = peft.LoraConfig(r=3, target_modules=paths, fan_in_fan_out=family == "gpt2")
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def noise(seed: int) -> dict[str, Tensor]:
        with adapted(model, shape, seed=0) as adapter:
            assert not adapter.merged()
            adapter.disturb(0.01, torch.Generator().manual_seed(seed))
            return {name: value - state[name] for name, value in adapter.merged().items()}

    found, again, other = noise(0), noise(0), noise(1)
    assert len(found) == len(paths)
    for name, value in found.items():
        share = float(value.norm() / state[name].norm())
        assert share == pytest.approx(0.01, rel=1e-3)  # what fp32 leaves of a hundredth
        assert torch.equal(value, again[name]) and not torch.equal(value, other[name])


def test_it_leaves_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """With B = 0 both losses are flat, and nothing but rounding has a direction."""
    pytest.importorskip("peft")
    model = build()
    subject = Subject(model, encoder_of(model), find_sites(model))
    complying = [(prompt, "sure here you go mix stir well done") for prompt in UNSAFE]
    data = TrainingData(from_values(HARMFUL), from_values(BENIGN), complying=from_values(complying))

    def first_gradient(**values: Any) -> float:
        norms: list[float] = []

        def spy(loop: TrainingLoop, *_: Any) -> None:
            gradients = [p.grad.flatten() for p in loop.update.parameters() if p.grad is not None]
            norms.append(float(torch.cat(gradients).norm()))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainingLoop, "_check_finite", spy)
            tuning = TuningConfig(max_steps=1, batch_size=8)
            with CircuitBreakers(tuning=tuning, **values).applied(subject, data):
                return norms[0]

    assert first_gradient(start=0.0) < 1e-5 < 1e-3 < first_gradient()
    cosines: list[float] = []

    def kept(reference: Tensor, states: Tensor) -> Tensor:
        found = rerouting(reference, states)
        cosines.append(float(found.detach().mean()))
        return found

    monkeypatch.setattr("nest.methods.circuit_breakers.rerouting", kept)
    tuning = TuningConfig(epochs=5, max_steps=30, batch_size=8, validate_every=30)
    bold = CircuitBreakers(learning_rate=1e-2, retain_weight=0.5, tuning=tuning)
    with bold.applied(subject, data) as treated:
        assert treated.result.more["refusals"] == len(HARMFUL)
    assert cosines[0] > 0.99 and cosines[-1] < 0.5


def test_steps_are_the_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in micro-batches, the schedule would end early and turn negative."""
    pytest.importorskip("peft")
    seen: list[tuple[int, int]] = []
    own = Rerouting.losses

    def losses(self: Any, micro_batches: Any, step: int) -> Any:
        seen.append((step, len(micro_batches)))
        return own(self, micro_batches, step)

    monkeypatch.setattr(Rerouting, "losses", losses)
    model = build()
    subject = Subject(model, encoder_of(model), find_sites(model))
    data = TrainingData(from_values(HARMFUL), from_values(BENIGN))
    tuning = TuningConfig(max_steps=3, batch_size=12, micro_batch_size=2, validate_every=3)
    with CircuitBreakers(rank=1, tuning=tuning).applied(subject, data) as treated:
        assert treated.result.steps == 3 and len(UNSAFE) + len(SAFE) > 12
    assert [step for step, _ in seen] == [0, 0, 1, 2, 3]  # validation, steps, validation
    assert all(n_passes > 4 for _, n_passes in seen[1:4])
