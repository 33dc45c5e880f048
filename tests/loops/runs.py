"""An update trained by somebody else's loop, what must hold of it, and the same batches in plain torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_models import build, choose, same_bits, state_of
from torch import Tensor, nn

from nest.patches.patch import NeuronPatch
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.update import PARAMETER, ClusterUpdate, trainable

RATE, BATCH = 0.02, 3
PAD, IGNORED = 0, -100
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """What the loop gave the model in one pass, and the state of chance then."""

    batch: Batch
    chance: Tensor


class Recorded:
    """A Trainer that remembers what it trains on, in order; put before the trainer's own class."""

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            batch = {name: value.clone() for name, value in inputs.items()}
            self.__dict__.setdefault("seen", []).append(Step(batch, torch.get_rng_state()))
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]


@dataclass
class Trained:
    """What is left of a run.

    Attributes:
        patch: Of the update as the loop left it.
        packed: The update's numbers.
        saved: What the loop's last checkpoint holds, if it wrote one.
        before: The loss on all the data before.
        after: The same after.
    """

    patch: NeuronPatch
    packed: Tensor
    saved: dict[str, Tensor] | None
    before: float
    after: float


def examples(*, of_one_length: bool = False) -> list[dict[str, list[int]]]:
    """Sequences of several lengths, so that batches are padded and hold unequal numbers of tokens."""
    draw = torch.Generator().manual_seed(3)
    lengths = [6 if of_one_length else 4 + 3 * i % 5 for i in range(12)]
    ids = [torch.randint(7, 20, (length,), generator=draw).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


def collate(rows: Sequence[dict[str, list[int]]]) -> Batch:
    def padded(values: Iterable[list[int]], fill: int) -> Tensor:
        parts = [torch.tensor(value) for value in values]
        return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)

    ids = padded([row["input_ids"] for row in rows], PAD)
    return {
        "input_ids": ids,
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": padded([row["labels"] for row in rows], IGNORED),
    }


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of every labelled token."""
    mask = batch.get("attention_mask")
    logits = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, reduction="none")
    return losses[labels != IGNORED]


def mean_loss(model: nn.Module, steps: Sequence[Batch]) -> float:
    """Over all tokens of some batches, without dropout and without autocast."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return float(torch.cat([token_losses(model, batch) for batch in steps]).mean())
    finally:
        model.train(was_training)


@contextmanager
def watched(
    model: nn.Module, selection: Any = None, **how: Any
) -> Iterator[tuple[ClusterUpdate, Callable[[Path | None], Trained]]]:
    """`trainable`, with a function that checks the model as the loop left it.

    Everywhere the update's patch folded into the base is what the model holds, and its other weights are
    the base's, bit for bit; so is the whole model after the block.
    """
    base = state_of(model)
    batches = [collate(examples())]
    with trainable(model, selection or choose(model), **how) as update:
        start, before = update.packed.detach().clone(), mean_loss(model, batches)

        def finish(folder: Path | None = None) -> Trained:
            packed = update.packed.detach().clone()
            assert not torch.equal(packed, start)
            patch = update.patch()
            assert_carries(state_of(model), base, patch)
            saved = None
            if folder is not None:
                saved = load_file(folder / "model.safetensors")
                assert torch.equal(saved.pop(f"{PARAMETER}.packed"), packed)
                # Tied weights are saved under one of their names.
                assert_carries(saved, {name: base[name] for name in saved}, patch)
            return Trained(patch, packed, saved, before, mean_loss(model, batches))

        yield update, finish
    assert same_bits(base, state_of(model))
    assert not any(name.startswith(PARAMETER) for name, _ in model.named_parameters())


def assert_carries(state: dict[str, Tensor], base: dict[str, Tensor], patch: NeuronPatch) -> None:
    """A model's weights are the base's with this patch folded in."""
    expected = {
        name: patch.fold_tensor(name, value) if name in patch.parameters else value
        for name, value in base.items()
    }
    assert same_bits(state, expected)


def plain(
    steps: Sequence[Sequence[Step]],
    *,
    optimizer: Callable[[ClusterUpdate], Any] = lambda update: NeuronAdamW(update, lr=RATE),
    loss: Callable[[nn.Module, Sequence[Step]], Iterator[Tensor]] | None = None,
    model: Callable[[], nn.Module] = build,
    autocast: bool = False,
    train: bool = False,
) -> Tensor:
    """The update after the same passes in a loop of our own; a step is what is accumulated for one."""
    made = model()
    cast: AbstractContextManager[Any] = contextlib.nullcontext()
    if autocast:
        cast = torch.autocast("cpu", torch.bfloat16)
    with trainable(made, choose(made)) as update:
        made.train(train)
        ours = optimizer(update)
        for passes in steps:
            parts = (loss or accumulated)(made, passes)
            for step in passes:
                torch.set_rng_state(step.chance)
                with cast:
                    part = next(parts)
                part.backward()
            ours.step()
            ours.zero_grad()
        return update.packed.detach().clone()


def accumulated(model: nn.Module, passes: Sequence[Step]) -> Iterator[Tensor]:
    """Each pass's part of the mean over all tokens of a step."""
    n_tokens = sum(int((step.batch["labels"][:, 1:] != IGNORED).sum()) for step in passes)
    for step in passes:
        yield token_losses(model, step.batch).sum() / n_tokens


def grouped(seen: Sequence[Step], n: int) -> list[Sequence[Step]]:
    return [seen[i : i + n] for i in range(0, len(seen), n)]


def assert_close(packed: Tensor, expected: Tensor, step: float = 1e-3) -> None:
    """To a part of one step of Adam's, which is of the learning rate's size however small the gradient."""
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=step * RATE)
