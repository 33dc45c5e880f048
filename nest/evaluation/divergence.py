"""How far a patched model's predictions are from the base model's on the same dialogues."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nest.conversations.answers import kl_divergence, log_probs_of, target_logits
from nest.conversations.batches import Batch, collate
from nest.conversations.conversation import Prompt
from nest.conversations.encoders import Encoder
from nest.errors import ActivationError
from nest.models.modes import eval_mode

TOKENS_PER_BATCH = 2048
"""Most tokens in a batch: with a vocabulary of 150 k their fp32 logits are 1.2 GB."""
BASE_MEMORY_BYTES = 2**28
"""Most bytes of base log-probabilities kept while the patch is out; each switch writes the rows."""


@torch.no_grad()
def kl_to_base(
    model: nn.Module,
    encoder: Encoder,
    dialogues: Sequence[tuple[Prompt, str]],
    removed: Callable[[], AbstractContextManager[object]],
    batch_size: int = 256,
    progress: Callable[[str, int, int], None] | None = None,
) -> float:
    """Mean over answer tokens of KL(base || model) in nats, the answers being the references.

    KL_t = sum_v p_base(v | t) (log p_base(v | t) - log p_model(v | t)), in fp32, v over the
    vocabulary. `model` carries the patch and has it back, bit for bit, when this returns.

    Args:
        dialogues: (prompt, reference answer), at least one.
        removed: The base model for the time of a block: `lambda: patch.removed(model)`.
        batch_size: Most dialogues in a batch.
        progress: Called as `progress("kl", dialogues done, dialogues)`.

    Raises:
        ActivationError: a model computes NaN.
    """
    if not dialogues:
        raise ValueError("no dialogues to compare on; expected at least one")
    total, count, done = 0.0, 0, 0
    pending = list(_batches(encoder, dialogues, batch_size))
    with eval_mode(model):
        while pending:
            base = _base_log_probs(model, pending, removed)
            for batch, expected in zip(pending, base, strict=False):
                found = _answer_log_probs(model, batch)
                total += float(kl_divergence(expected, found))
                count += len(expected)
                done += len(batch.indices)
                if progress is not None:
                    progress("kl", done, len(dialogues))
            pending = pending[len(base) :]
    return _mean(total, count)


@torch.no_grad()
def answer_log_probs(
    model: nn.Module,
    encoder: Encoder,
    dialogues: Sequence[tuple[Prompt, str]],
    batch_size: int = 256,
) -> list[Float[Tensor, "N V"]]:
    """Log-probabilities, fp32, at the tokens of the answers, batch by batch, for `mean_kl`.

    Args:
        model: As it is.
        dialogues: (prompt, reference answer), at least one; the same give the same batches.
        batch_size: Most dialogues in a batch.
    """
    with eval_mode(model):
        batches = _batches(encoder, dialogues, batch_size)
        return [_answer_log_probs(model, batch) for batch in batches]


def mean_kl(base: Sequence[Float[Tensor, "N V"]], found: Sequence[Float[Tensor, "N V"]]) -> float:
    """Mean over tokens of KL(base || found) in nats, of what `answer_log_probs` gave for two models.

    Raises:
        ValueError: other batches, or none.
        ActivationError: a model computes NaN.
    """
    if [each.shape for each in base] != [each.shape for each in found] or not base:
        raise ValueError("the log-probabilities are not of the same dialogues")
    pairs = zip(base, found, strict=True)
    total = sum(float(kl_divergence(one, other)) for one, other in pairs)
    return _mean(total, sum(len(each) for each in base))


def _mean(total: float, count: int) -> float:
    if not math.isfinite(total):
        raise ActivationError(
            "the KL to the base model is not a finite number: the model computes NaN or infinity at "
            "answers to harmless prompts, and is broken"
        )
    return max(0.0, total / count)  # below zero by rounding only


def _base_log_probs(
    model: nn.Module,
    batches: Sequence[Batch],
    removed: Callable[[], AbstractContextManager[object]],
) -> list[Float[Tensor, "N V"]]:
    """The base model's log-probabilities for as many of the first batches as the memory allows."""
    base: list[Tensor] = []
    memory_bytes = 0
    with removed():
        for batch in batches:
            base.append(_answer_log_probs(model, batch))
            memory_bytes += base[-1].numel() * base[-1].element_size()
            if memory_bytes > BASE_MEMORY_BYTES:
                break
    return base


def _batches(
    encoder: Encoder, dialogues: Sequence[tuple[Prompt, str]], batch_size: int
) -> Iterator[Batch]:
    encoded = [encoder.dialogue(prompt, answer) for prompt, answer in dialogues]
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index][0]))
    start = 0
    while start < len(order):
        size = max(1, min(batch_size, TOKENS_PER_BATCH // len(encoded[order[start]][0])))
        chosen = order[start : start + size]
        yield collate(
            [encoded[index][0] for index in chosen],
            [encoded[index][1] for index in chosen],
            encoder.pad_id,
        )
        start += size


def _answer_log_probs(model: nn.Module, batch: Batch) -> Float[Tensor, "N V"]:
    """Log-probabilities, fp32, at the N positions that predict an answer token."""
    device = next(model.parameters()).device
    return log_probs_of(target_logits(model, batch, device).logits)
