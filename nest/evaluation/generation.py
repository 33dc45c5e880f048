"""Greedy decoding in batches, whose tokens do not depend on the batch a prompt is in.

Prompts of equal length share a batch without padding. Only where few prompts share a length are
different lengths put together, padded on the left with a mask and explicit positions. A loop of our
own and not `generate`: it drops sequences that have ended from the batch, needs no sampling flags
neutralised and works on any `nn.Module`.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from nest.errors import InputError
from nest.models.chat import Encoder, collate, logits_of, run_model

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

TOKENS_PER_BATCH = 65_536
"""Most prompt tokens in a batch, so that long prompts get smaller batches."""


def generate(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> list[str]:
    """The model's greedy answer to each prompt, in the prompts' order.

    The model is run in eval mode without gradients and is left in the mode it was in; no random
    number is drawn. A batch can differ from a single prompt by the rounding of the matrix products
    only, which in fp32 changes no token short of a tie.

    Args:
        model: transformers decoder (decoded with its cache) or any module (recomputed at every
        token).
        encoder: Turns prompts into tokens and tokens into text.
        prompts: User messages.
        max_new_tokens: Longest answer; shorter where the context ends.
        batch_size: Most prompts in a batch.
        progress: Called as `progress("generate", prompts done, prompts)`.

    Raises:
        InputError: a prompt that fills the context, or a count below one.
    """
    encoded = [encoder.prompt(prompt) for prompt in prompts]
    answers = generate_tokens(model, encoder, encoded, max_new_tokens, batch_size, progress)
    return [encoder.decode(answer) for answer in answers]


@torch.no_grad()
def generate_tokens(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> list[list[int]]:
    """`generate` on token ids: the answers' tokens without the end-of-sequence token.

    Args:
        prompts: Token ids, each at least one; equal prompts are decoded once.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise InputError(
            f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}; expected at least 1"
        )
    unique = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
    known = _forward_parameters(model)
    has_cache = {"past_key_values", "use_cache"} <= known
    decode = _decode_cached if has_cache else _decode_recomputed
    # Only the cached loop passes positions; without them left padding would shift the answers.
    may_pad = has_cache and "position_ids" in known
    batches = _plan(unique, encoder.max_tokens, max_new_tokens, batch_size, may_pad)
    answers: dict[tuple[int, ...], list[int]] = {}
    with eval_mode(model):
        for indices, allowance in batches:
            batch = [unique[index] for index in indices]
            answers.update(zip(batch, decode(model, encoder, batch, allowance), strict=True))
            if progress is not None:
                progress("generate", len(prompts) * len(answers) // len(unique), len(prompts))
    return [list(answers[tuple(prompt)]) for prompt in prompts]


# --- batches --------------------------------------------------------------------------------------


def _plan(
    prompts: Sequence[Sequence[int]],
    max_tokens: int | None,
    max_new_tokens: int,
    batch_size: int,
    may_pad: bool,
) -> list[tuple[list[int], int]]:
    """(prompts' indices, new tokens allowed) of every batch, long prompts first.

    Prompts near the end of the context keep to batches of their own length, since their allowance
    is smaller; the rest of the rare lengths is padded together.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        if max_tokens is not None and len(prompt) >= max_tokens:
            raise InputError(
                f"a prompt has {len(prompt)} tokens and the model's context {max_tokens}; shorten "
                "the prompt so that an answer fits"
            )
        by_length[len(prompt)].append(index)
    few = min(batch_size, 32) // 4
    batches: list[tuple[list[int], int]] = []
    rare: list[int] = []
    for length, indices in sorted(by_length.items(), reverse=True):
        room = max_new_tokens if max_tokens is None else max_tokens - length
        allowance = min(max_new_tokens, room)
        if may_pad and len(indices) <= few and allowance == max_new_tokens:
            rare.extend(indices)
            continue
        size = max(1, min(batch_size, TOKENS_PER_BATCH // max(length, 1)))
        batches.extend((indices[i : i + size], allowance) for i in range(0, len(indices), size))
    start = 0
    while start < len(rare):  # sorted by length, so the first is the longest
        size = max(1, min(batch_size, TOKENS_PER_BATCH // max(len(prompts[rare[start]]), 1)))
        batches.append((rare[start : start + size], max_new_tokens))
        start += size
    return batches


# --- decoding -------------------------------------------------------------------------------------


class _Answers:
    """Answers that grow by a token a step; `rows` says which of them the batch still holds."""

    def __init__(self, count: int, eos_ids: frozenset[int], device: torch.device) -> None:
        self._columns: list[tuple[list[int], Tensor]] = []
        self.rows = list(range(count))
        self._count = count
        self._eos = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)
        self._eos_ids = eos_ids
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)

    def add(self, tokens: Int[Tensor, " B"]) -> None:
        self._columns.append((self.rows, tokens))
        self.ended = self.ended | torch.isin(tokens, self._eos)

    def kept(self, at_most: float = 1.0) -> Tensor | None:
        """Rows still going, where they are at most this share of the batch; None to keep all."""
        going = ~self.ended
        remaining = int(going.sum())
        if remaining == 0 or remaining == len(self.rows) or remaining > at_most * len(self.rows):
            return None
        return going.nonzero().squeeze(1)  # (remaining,)

    def keep(self, index: Int[Tensor, " B"]) -> None:
        self.rows = [self.rows[row] for row in index.tolist()]
        self.ended = self.ended[index]

    def tokens(self) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in range(self._count)]
        closed = [False] * self._count
        for rows, column in self._columns:
            values: list[int] = column.tolist()
            for row, token in zip(rows, values, strict=True):
                closed[row] = closed[row] or token in self._eos_ids
                if not closed[row]:
                    answers[row].append(token)
        return answers


def _decode_cached(
    model: nn.Module, encoder: Encoder, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Greedy decoding with the model's key-value cache."""
    device = next(model.parameters()).device
    parameters = _forward_parameters(model)
    batch = collate(prompts, None, encoder.pad_id, side="left")
    input_ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
    padded = not bool(mask.all())
    answers = _Answers(len(prompts), encoder.eos_ids, device)
    # the vocabulary's logits are wanted at the last position only: at 150 k tokens of vocabulary
    # they would be the largest tensor by far
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    cache: Any = None
    for step in range(max_new_tokens):
        extra: dict[str, Any] = dict(last_only)
        if padded:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            extra |= {"attention_mask": mask, "position_ids": positions[:, -input_ids.shape[1] :]}
        output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, **extra)
        cache = output.past_key_values
        tokens = output.logits[:, -1].argmax(-1)  # (B,)
        answers.add(tokens)
        if bool(answers.ended.all()) or step + 1 == max_new_tokens:
            break
        index = answers.kept(at_most=0.75) if _can_select(cache) else None
        if index is not None:
            cache.batch_select_indices(index)
            answers.keep(index)
            tokens, mask = tokens[index], mask[index]
        input_ids = tokens[:, None]  # (B, 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)  # (B, T + 1)
    return answers.tokens()


def _decode_recomputed(
    model: nn.Module, encoder: Encoder, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Greedy decoding by a whole forward pass a token, for modules without a cache."""
    device = next(model.parameters()).device
    batch = collate(prompts, None, encoder.pad_id, side="left")
    input_ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
    answers = _Answers(len(prompts), encoder.eos_ids, device)
    for _ in range(max_new_tokens):
        tokens = logits_of(run_model(model, input_ids, mask))[:, -1].argmax(-1)  # (B,)
        answers.add(tokens)
        if bool(answers.ended.all()):
            break
        index = answers.kept()
        if index is not None:
            answers.keep(index)
            tokens, input_ids, mask = tokens[index], input_ids[index], mask[index]
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)  # (B, T + 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return answers.tokens()


def _can_select(cache: Any) -> bool:
    """Whether every layer of a transformers cache can drop rows of its batch."""
    layers: Any = getattr(cache, "layers", None)
    return bool(layers) and all(hasattr(layer, "batch_select_indices") for layer in layers)


def _forward_parameters(model: nn.Module) -> set[str]:
    # PEFT's wrapper hides the names behind **kwargs; its base model knows them
    unwrap = getattr(model, "get_base_model", None)
    base: Any = unwrap() if callable(unwrap) else model
    return set(inspect.signature(base.forward).parameters)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode within; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
