"""Decoding one batch: with the model's key-value cache, or by a whole forward pass a token.

Loops of our own and not `generate`: a beginning that all prompts of a batch share is run once, and so is a
prompt that gets several answers; the key-value cache grows in place, sequences that have ended are dropped
from the batch, no sampling flags need to be neutralised and any `nn.Module` will do.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nest.conversations.batches import collate
from nest.generation.drawing import chances, drawn
from nest.generation.sampling import Sampling
from nest.models.calls import logits_of, run_model

STOP_EVERY = 8
"""Tokens after which answers are read for stop texts: a reading costs some 30 us an answer."""


class Decoded(NamedTuple):
    """What a model said.

    Attributes:
        token_ids: Without the end-of-sequence token; at most a few beyond a stop text.
        ended: Whether the model, or a stop text, ended it; else the limit did.
    """

    token_ids: list[int]
    ended: bool


Choice = Callable[[Float[Tensor, "B V"], Sequence[int], int], Int[Tensor, " B"]]
"""Next tokens from their logits, the numbers of the answers that the rows are of, and the step."""

IsOver = Callable[[int, Sequence[int]], bool]
"""Whether an answer, by its number in the batch, with these tokens, holds a stop text."""


def greedy(logits: Float[Tensor, "B V"], rows: Sequence[int], step: int) -> Int[Tensor, " B"]:
    """The likeliest tokens."""
    return logits.argmax(-1)


def by_chance(
    prompts: Sequence[Sequence[int]], samples: range, sampling: Sampling, device: torch.device
) -> Choice:
    """A choice by `drawn`, every answer with a stream of numbers of its own."""
    length = sampling.max_new_tokens
    streams = [chances(sampling.seed, prompt, i, length) for prompt in prompts for i in samples]
    numbers = torch.from_numpy(np.stack(streams)).to(device)  # (answers, T)

    def choose(logits: Float[Tensor, "B V"], rows: Sequence[int], step: int) -> Int[Tensor, " B"]:
        return drawn(logits, numbers[rows, step], sampling)

    return choose


@dataclass(frozen=True)
class BatchDecoder:
    """Decodes the answers to a batch of prompts, several answers to each.

    Args:
        model: In eval mode; gradients are the caller's to switch off.
        pad_id: Fills prompts up.
        eos_ids: End an answer.
        interrupted: Stops between two tokens once it is set: a batch may take minutes, and nobody waits
            for the answers of an interrupted run.
    """

    model: nn.Module
    pad_id: int
    eos_ids: frozenset[int]
    interrupted: threading.Event

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        choose: Choice,
        *,
        max_new_tokens: int,
        n_samples: int = 1,
        n_shared: int = 0,
        is_over: IsOver | None = None,
    ) -> list[Decoded]:
        """All answers to the first prompt, then those to the second, and so on.

        Args:
            prompts: Token ids; of one length where `may_pad` forbids others.
            choose: The next tokens.
            max_new_tokens: Longest answer.
            n_samples: Answers to each prompt.
            n_shared: How many first tokens all prompts have in common, to be run once.
            is_over: Asked every `STOP_EVERY` tokens; None where there are no stop texts.
        """
        n_answers = len(prompts) * n_samples
        answers = _Answers(n_answers, self.eos_ids, device_of(self.model), is_over)
        if has_cache(self.model):
            return self._cached(prompts, n_samples, n_shared, answers, choose, max_new_tokens)
        repeated = [prompt for prompt in prompts for _ in range(n_samples)]
        return self._recomputed(repeated, answers, choose, max_new_tokens)

    def _cached(
        self,
        prompts: Sequence[Sequence[int]],
        n_samples: int,
        n_shared: int,
        answers: _Answers,
        choose: Choice,
        max_new_tokens: int,
    ) -> list[Decoded]:
        """With the key-value cache; the first `n_shared` tokens, and each prompt, are run once."""
        device = device_of(self.model)
        # the vocabulary's logits are wanted at the last position only: at 150 k tokens of vocabulary
        # they would be the largest tensor by far
        last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(self.model) else {}
        )
        cache = self._shared_cache(prompts, n_shared, last_only) if n_shared else None
        if cache is None:
            n_shared = 0
        # padding stands before a prompt's own tokens: between them and those that all prompts share
        batch = collate([prompt[n_shared:] for prompt in prompts], None, self.pad_id, side="left")
        input_ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        padded = not bool(batch.attention_mask.all())
        mask = torch.cat([mask.new_ones(len(mask), n_shared), mask], dim=1)  # (B, T)
        for step in range(max_new_tokens):
            extra: dict[str, Any] = dict(last_only)
            if padded:
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                extra |= {
                    "attention_mask": mask,
                    "position_ids": positions[:, -input_ids.shape[1] :],
                }
            output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **extra)
            cache, logits = output.past_key_values, output.logits[:, -1]
            several = step == 0 and n_samples > 1
            if several:
                logits = logits.repeat_interleave(n_samples, dim=0)
            tokens = choose(logits, answers.rows, step)  # (B,)
            answers.add(tokens)
            if answers.all_ended() or step + 1 == max_new_tokens or self.interrupted.is_set():
                break
            if several and not _can_select(cache):  # once more, with a row an answer
                repeated = [prompt for prompt in prompts for _ in range(n_samples)]
                answers.restart()
                return self._cached(repeated, 1, n_shared, answers, choose, max_new_tokens)
            if several:
                row_of = torch.arange(len(prompts), device=device).repeat_interleave(n_samples)
                cache.batch_select_indices(row_of)
                mask = mask[row_of]
            if step == 0 and n_shared == 0 and _is_plain(cache):
                _grow_in_place(cache, len(tokens))
            index = answers.kept(at_most=0.75) if _can_select(cache) else None
            if index is not None:
                cache.batch_select_indices(index)
                answers.keep(index)
                tokens, mask = tokens[index], mask[index]
            input_ids = tokens[:, None]  # (B, 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)  # (B, T + 1)
        return answers.decoded()

    def _shared_cache(
        self, prompts: Sequence[Sequence[int]], n_shared: int, last_only: dict[str, int]
    ) -> Any:
        """The cache of the tokens that all prompts begin with; None for a cache that is not plain."""
        shared = torch.tensor([prompts[0][:n_shared]], device=device_of(self.model))
        cache = self.model(input_ids=shared, use_cache=True, **last_only).past_key_values
        if not _is_plain(cache):  # a window, say, that padding in the middle would eat into
            return None
        _grow_in_place(cache, len(prompts))
        return cache

    def _recomputed(
        self,
        prompts: Sequence[Sequence[int]],
        answers: _Answers,
        choose: Choice,
        max_new_tokens: int,
    ) -> list[Decoded]:
        """By a whole forward pass a token, for modules without a cache."""
        device = device_of(self.model)
        batch = collate(prompts, None, self.pad_id, side="left")
        input_ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        for step in range(max_new_tokens):
            logits = logits_of(run_model(self.model, input_ids, mask))[:, -1]
            tokens = choose(logits, answers.rows, step)  # (B,)
            answers.add(tokens)
            if answers.all_ended() or self.interrupted.is_set():
                break
            index = answers.kept()
            if index is not None:
                answers.keep(index)
                tokens, input_ids, mask = tokens[index], input_ids[index], mask[index]
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)  # (B, T + 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return answers.decoded()


class _Answers:
    """Answers that grow by a token a step; `rows` says which of them the batch still holds."""

    def __init__(
        self, count: int, eos_ids: frozenset[int], device: torch.device, is_over: IsOver | None
    ) -> None:
        self._count, self._eos_ids, self._is_over = count, eos_ids, is_over
        self._eos = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)
        self.restart()

    def restart(self) -> None:
        """Nothing was said yet."""
        self.rows = list(range(self._count))
        self._ended = torch.zeros(self._count, dtype=torch.bool, device=self._eos.device)
        self._columns: list[tuple[list[int], Tensor]] = []  # not yet in `_said`
        self._said: list[list[int]] = [[] for _ in self.rows]
        self._closed = [False] * self._count
        self._n_steps = 0

    def add(self, tokens: Int[Tensor, " B"]) -> None:
        """A token for each of `rows`."""
        self._columns.append((self.rows, tokens))
        self._ended = self._ended | torch.isin(tokens, self._eos)
        self._n_steps += 1
        if self._is_over is not None and self._n_steps % STOP_EVERY == 0:
            self._end_at_stop_texts(self._is_over)

    def all_ended(self) -> bool:
        """Whether no answer goes on."""
        return bool(self._ended.all())

    def kept(self, at_most: float = 1.0) -> Tensor | None:
        """Rows still going, where they are at most this share of the batch; None to keep all."""
        going = ~self._ended
        remaining = int(going.sum())
        if remaining == 0 or remaining == len(self.rows) or remaining > at_most * len(self.rows):
            return None
        return going.nonzero().squeeze(1)  # (remaining,)

    def keep(self, index: Int[Tensor, " B"]) -> None:
        """Drop the others."""
        self.rows = [self.rows[row] for row in index.tolist()]
        self._ended = self._ended[index]

    def decoded(self) -> list[Decoded]:
        """All answers, in the order of their numbers."""
        self._read()
        return [Decoded(ids, ended) for ids, ended in zip(self._said, self._closed, strict=True)]

    def _read(self) -> None:
        for rows, column in self._columns:
            values: list[int] = column.tolist()
            for row, token in zip(rows, values, strict=True):
                self._closed[row] = self._closed[row] or token in self._eos_ids
                if not self._closed[row]:
                    self._said[row].append(token)
        self._columns = []

    def _end_at_stop_texts(self, is_over: IsOver) -> None:
        self._read()
        for place, row in enumerate(self.rows):
            if not self._closed[row] and is_over(row, self._said[row]):
                self._closed[row] = True
                self._ended[place] = True


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs go."""
    return next(model.parameters()).device


def has_cache(model: nn.Module) -> bool:
    """Whether a model is decoded with its key-value cache."""
    return {"past_key_values", "use_cache"} <= forward_parameters(model)


def may_pad(model: nn.Module) -> bool:
    """Whether prompts of different lengths may share a batch.

    Only the cached loop passes positions; without them left padding would shift the answers.
    """
    return has_cache(model) and "position_ids" in forward_parameters(model)


def forward_parameters(model: nn.Module) -> set[str]:
    """Names of what a model's forward pass takes."""
    # PEFT's wrapper hides the names behind **kwargs; its base model knows them
    unwrap = getattr(model, "get_base_model", None)
    base: Any = unwrap() if callable(unwrap) else model
    return set(inspect.signature(base.forward).parameters)


def _is_plain(cache: Any) -> bool:
    if not hasattr(cache, "layers"):
        return False
    from nest.generation.cache import is_plain

    return is_plain(cache)


def _grow_in_place(cache: Any, n_rows: int) -> None:
    from nest.generation.cache import grow_in_place

    grow_in_place(cache, n_rows)


def _can_select(cache: Any) -> bool:
    """Whether every layer of a transformers cache can drop rows of its batch."""
    layers: Any = getattr(cache, "layers", None)
    return bool(layers) and all(hasattr(layer, "batch_select_indices") for layer in layers)
