"""Greedy decoding in batches, whose tokens do not depend on the batch a prompt is in.

A loop of our own and not `generate`: a beginning that all prompts of a batch share is run once, the
key-value cache grows in place, sequences that have ended are dropped from the batch, no sampling
flags need to be neutralised and any `nn.Module` will do.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from nest.artifacts.unfinished import Unfinished
from nest.conversations.batches import collate
from nest.conversations.encoders import Encoder
from nest.errors import InputError
from nest.evaluation.config import Engine
from nest.generation.batches import DecodingBatch, plan_batches
from nest.generation.paged import decode_paged, pays, why_not_paged
from nest.generation.workers import n_workers, run_each
from nest.models.calls import logits_of, run_model
from nest.models.modes import eval_mode

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

BATCH_COST_TOKENS = {"cpu": 1024}
"""Prompt tokens that run in the time that one more batch costs, by device.

A batch of the embedded model with answers of 15 tokens costs 16 calls of 1.7 ms before its first row
counts, a prompt token some 45 us: 600 tokens. The demo's answers took 11.3 s at 1024 and 11.6 s at 512."""

BATCH_COST_TOKENS_ELSEWHERE = 65_536
"""The same on a GPU (an estimate): a call costs as much as thousands of tokens, so that full batches
come first."""


def generate(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 256,
    progress: Progress | None = None,
    *,
    engine: Engine = "auto",
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
        engine: `static` decodes batches that are planned ahead, `paged` is the continuous batching
            of transformers, `auto` takes `paged` where it should pay (`nest.generation.paged.pays`).

    Raises:
        InputError: a prompt that fills the context, a count below one, or `paged` for a model that
            it cannot decode.
    """
    encoded = [encoder.prompt(prompt) for prompt in prompts]
    answers = generate_tokens(
        model, encoder, encoded, max_new_tokens, batch_size, progress, engine=engine
    )
    return [encoder.decode(answer) for answer in answers]


@torch.no_grad()
def generate_tokens(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 256,
    progress: Progress | None = None,
    *,
    engine: Engine = "auto",
    work: Unfinished | None = None,
) -> list[list[int]]:
    """`generate` on token ids: the answers' tokens without the end-of-sequence token.

    Args:
        prompts: Token ids, each at least one; equal prompts are decoded once.
        work: Keeps the answers of every batch, so that a later run decodes the others only.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise InputError(
            f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}; expected at least 1"
        )
    unique = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
    known = _forward_parameters(model)
    has_cache = {"past_key_values", "use_cache"} <= known
    batches = plan_batches(
        unique,
        max_tokens=encoder.max_tokens,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        # Only the cached loop passes positions; without them left padding would shift the answers.
        may_pad=has_cache and "position_ids" in known,
        batch_cost_tokens=BATCH_COST_TOKENS.get(
            next(model.parameters()).device.type, BATCH_COST_TOKENS_ELSEWHERE
        ),
    )

    def report(done: int) -> None:
        if progress is not None:
            progress("generate", len(prompts) * done // len(unique), len(prompts))

    answers = _kept_answers(work)
    batches = [batch for batch in batches if not all(i in answers for i in batch.indices)]

    def keep(found: dict[int, list[int]]) -> None:
        answers.update(found)
        if work is not None:
            work.journal.add({"answers": {str(index): ids for index, ids in found.items()}})
        report(len(answers))

    ended = threading.Event()
    with eval_mode(model):
        if batches and _takes_paged(model, engine):
            allowances = {index: batch[2] for batch in batches for index in batch.indices}
            left = [index for index in range(len(unique)) if index not in answers]
            decode_paged(
                model,
                encoder,
                [unique[index] for index in left],
                [allowances[index] for index in left],
                batch_size,
                lambda number, ids: keep({left[number]: ids}),
            )
            batches = []

        def decode(planned: DecodingBatch) -> list[list[int]]:
            batch = [unique[index] for index in planned.indices]
            if has_cache:
                return _decode_cached(
                    model, encoder, batch, planned.n_shared, planned.max_new_tokens, ended
                )
            return _decode_recomputed(model, encoder, batch, planned.max_new_tokens)

        for planned, found in run_each(batches, decode, n_workers(model), ended):
            keep(dict(zip(planned.indices, found, strict=True)))
    numbers = {prompt: index for index, prompt in enumerate(unique)}
    return [list(answers[numbers[tuple(prompt)]]) for prompt in prompts]


def _kept_answers(work: Unfinished | None) -> dict[int, list[int]]:
    """The answers that an earlier run left, by the prompt's number among all different ones."""
    entries = () if work is None else work.journal.entries
    found = (entry["answers"] for entry in entries if "answers" in entry)
    return {int(index): ids for answers in found for index, ids in answers.items()}


def _takes_paged(model: nn.Module, engine: Engine) -> bool:
    fault = why_not_paged(model) if engine == "paged" else None
    if fault is not None:
        raise InputError(f"the paged engine cannot decode this model: {fault}; use engine static")
    return engine == "paged" or (engine == "auto" and pays(model))


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
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    n_shared: int,
    max_new_tokens: int,
    ended: threading.Event,
) -> list[list[int]]:
    """Greedy decoding with the model's key-value cache; the first `n_shared` tokens are run once.

    Stops when `ended` is set: a batch may take minutes, and an interrupted run must not wait for it.
    """
    device = next(model.parameters()).device
    # the vocabulary's logits are wanted at the last position only: at 150 k tokens of vocabulary
    # they would be the largest tensor by far
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in _forward_parameters(model) else {}
    cache = _shared_cache(model, prompts, n_shared, last_only) if n_shared else None
    if cache is None:
        n_shared = 0
    # padding stands before a prompt's own tokens: between them and those that all prompts share
    batch = collate([prompt[n_shared:] for prompt in prompts], None, encoder.pad_id, side="left")
    input_ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
    padded = not bool(batch.attention_mask.all())
    mask = torch.cat([mask.new_ones(len(mask), n_shared), mask], dim=1)  # (B, T)
    answers = _Answers(len(prompts), encoder.eos_ids, device)
    for step in range(max_new_tokens):
        extra: dict[str, Any] = dict(last_only)
        if padded:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            extra |= {"attention_mask": mask, "position_ids": positions[:, -input_ids.shape[1] :]}
        output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, **extra)
        tokens = output.logits[:, -1].argmax(-1)  # (B,)
        answers.add(tokens)
        if bool(answers.ended.all()) or step + 1 == max_new_tokens or ended.is_set():
            break
        if cache is None and _is_plain(output.past_key_values):
            _grow_in_place(output.past_key_values, len(tokens))
        cache = output.past_key_values
        index = answers.kept(at_most=0.75) if _can_select(cache) else None
        if index is not None:
            cache.batch_select_indices(index)
            answers.keep(index)
            tokens, mask = tokens[index], mask[index]
        input_ids = tokens[:, None]  # (B, 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)  # (B, T + 1)
    return answers.tokens()


def _shared_cache(
    model: nn.Module, prompts: Sequence[Sequence[int]], n_shared: int, last_only: dict[str, int]
) -> Any:
    """The cache of the tokens that all prompts begin with; None for a cache that is not plain."""
    shared = torch.tensor([prompts[0][:n_shared]], device=next(model.parameters()).device)
    cache = model(input_ids=shared, use_cache=True, **last_only).past_key_values
    if not _is_plain(cache):  # a window, say, that padding in the middle would eat into
        return None
    _grow_in_place(cache, len(prompts))
    return cache


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


def _forward_parameters(model: nn.Module) -> set[str]:
    # PEFT's wrapper hides the names behind **kwargs; its base model knows them
    unwrap = getattr(model, "get_base_model", None)
    base: Any = unwrap() if callable(unwrap) else model
    return set(inspect.signature(base.forward).parameters)
