"""Decoding in batches that are planned ahead, whose tokens do not depend on the batch a prompt is in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator, Sequence

import torch
from torch import nn

from nest.conversations.conversation import Conversation
from nest.conversations.encoders import Encoder
from nest.errors import EngineError, InputError
from nest.generation.asked import Asked, identity_of
from nest.generation.batches import DecodingBatch, plan_batches
from nest.generation.decoding import (
    BatchDecoder,
    Choice,
    Decoded,
    IsOver,
    by_chance,
    device_of,
    greedy,
    may_pad,
)
from nest.generation.engine import Completion, Which
from nest.generation.paged import paged_answers, pays, require_paged
from nest.generation.sampling import Sampling
from nest.generation.workers import n_workers, run_each
from nest.models.modes import eval_mode
from nest.progress import ProgressCallback

BATCH_COST_TOKENS = {"cpu": 1024}
"""Prompt tokens that run in the time that one more batch costs, by device.

A batch of the embedded model with answers of 15 tokens costs 16 calls of 1.7 ms before its first row
counts, a prompt token some 45 us: 600 tokens. The demo's answers took 11.3 s at 1024 and 11.6 s at 512."""

BATCH_COST_TOKENS_ELSEWHERE = 65_536
"""The same on a GPU (an estimate): a call costs as much as thousands of tokens, so that full batches
come first."""


class StaticEngine:
    """Answers of a model in this process, greedy or drawn, in batches of like prompts.

        engine = StaticEngine(model, encoder)
        for completion in engine.generate(conversations, Sampling(temperature=0.7, n=4)):
            conversations[completion.conversation], completion.sample, completion.text

    Answers to long prompts come first; `nest.generation.engine.answers` puts them in order.

    An answer depends on its prompt's tokens, and a drawn one besides on the seed and its own number: not
    on the batch size, the order, the other conversations, the number of samples, the threads, or what an
    interrupted run had done. Batches of other shapes round otherwise, by 1e-6 of a logit in fp32, which
    changes a token as rarely (none of 31,200 between batches of 1 and of 64). In bf16 they round by 1e-2,
    and answers part: of a random model of 9 M parameters, whose distributions are flatter than a trained
    one's, at one drawn token in 37, one in 9 with `top_p` 0.9, and one greedy token in 63.

    The model runs in eval mode without gradients while answers are read, and is in its own mode
    afterwards; torch's random state is not touched.

    Args:
        model: transformers decoder (decoded with its cache) or any module (recomputed at every token).
        encoder: Turns conversations into tokens and tokens into text.
        batch_size: Most answers in a batch.
        progress: Called as `progress("generate", answers done, answers)`.

    Raises:
        InputError: a batch size below 1.
    """

    name = "static"

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoder,
        *,
        batch_size: int = 256,
        progress: ProgressCallback | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1")
        if not isinstance(encoder, Encoder):
            raise InputError(
                f"encoder is a {type(encoder).__name__}; expected nest.ChatEncoder(tokenizer, model), or "
                "an encoder of your own"
            )
        self._model, self._encoder = model, encoder
        self._batch_size, self._progress = batch_size, progress

    @property
    def identity(self) -> str:
        """sha256 of weights, template and end-of-sequence tokens, computed anew each time."""
        return identity_of(self._model, self._encoder)

    def generate(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        *,
        skip: Container[tuple[int, int]] = frozenset(),
    ) -> Iterator[Completion]:
        """Answers batch by batch, those to long prompts first; the order is always the same.

        Batches are those of all conversations, and one is left out if all of it is skipped: a run that is
        gone on with computes the same bytes. `decode` of the encoder is called in one thread at a time.

        Args:
            conversations: Each ends with a user turn; of those with the same tokens one is answered.
            sampling: Greedy or drawn.
            skip: (conversation, sample) pairs that are not wanted.

        Raises:
            InputError: a conversation that the encoder refuses, or one that fills the context.
            ActivationError: logits that hold NaN.
        """
        asked = Asked(self._encoder, conversations, sampling, skip)
        batches = planned(self._model, self._encoder, asked.prompts, sampling, self._batch_size)
        return self._completions(asked, batches, sampling)

    def _completions(
        self, asked: Asked, batches: Sequence[DecodingBatch], sampling: Sampling
    ) -> Iterator[Completion]:
        wanted = [batch for batch in batches if asked.is_wanted(batch.indices, batch.samples)]
        done = asked.total - sum(_n_answers(asked, batch) for batch in wanted)

        def choice_of(batch: DecodingBatch) -> Choice:
            if sampling.is_greedy:
                return greedy
            prompts = [asked.prompts[index] for index in batch.indices]
            return by_chance(prompts, batch.samples, sampling, device_of(self._model))

        is_over = asked.is_over if sampling.stop else None
        for batch, answers in decoded_batches(
            self._model, self._encoder, asked.prompts, wanted, choice_of, is_over
        ):
            done += _n_answers(asked, batch)
            if self._progress is not None:
                self._progress("generate", done, asked.total)
            pairs = [(prompt, sample) for prompt in batch.indices for sample in batch.samples]
            for (prompt, sample), decoded in zip(pairs, answers, strict=True):
                yield from asked.completions(prompt, sample, decoded)


def _n_answers(asked: Asked, batch: DecodingBatch) -> int:
    return asked.n_askers(batch.indices) * len(batch.samples)


def planned(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch_size: int,
) -> list[DecodingBatch]:
    """`plan_batches` for a model.

    Raises:
        InputError: a prompt that fills the context.
    """
    return plan_batches(
        prompts,
        max_tokens=encoder.max_tokens,
        max_new_tokens=sampling.max_new_tokens,
        batch_size=batch_size,
        may_pad=may_pad(model),
        batch_cost_tokens=BATCH_COST_TOKENS.get(device_of(model).type, BATCH_COST_TOKENS_ELSEWHERE),
        n_samples=sampling.n,
    )


def decoded_batches(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    batches: Sequence[DecodingBatch],
    choice_of: Callable[[DecodingBatch], Choice],
    is_over: IsOver | None = None,
) -> Iterator[tuple[DecodingBatch, list[Decoded]]]:
    """The answers of each batch, prompt by prompt, in the batches' order.

    Args:
        model: Run in eval mode, without gradients, until the iterator is used up or closed.
        encoder: For the tokens that pad and that end.
        prompts: Token ids, none twice.
        batches: Of `planned`, or some of them.
        choice_of: How the tokens of a batch's answers are chosen.
        is_over: Whether what was said to a prompt, by its number, holds a stop text.
    """
    interrupted = threading.Event()
    decoder = BatchDecoder(model, encoder.pad_id, encoder.eos_ids, interrupted)
    reading = threading.Lock()  # a user's tokenizer need not expect several threads

    def decode(batch: DecodingBatch) -> list[Decoded]:
        def holds_stop(answer: int, token_ids: Sequence[int]) -> bool:
            assert is_over is not None
            with reading:
                return is_over(batch.indices[answer // len(batch.samples)], token_ids)

        with torch.no_grad():
            return decoder.decode(
                [prompts[index] for index in batch.indices],
                choice_of(batch),
                max_new_tokens=batch.max_new_tokens,
                n_samples=len(batch.samples),
                n_shared=batch.n_shared,
                is_over=None if is_over is None else holds_stop,
            )

    with eval_mode(model):
        yield from run_each(batches, decode, n_workers(model), interrupted)


# --- token ids in, token ids out ------------------------------------------------------------------


def generate(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 256,
    progress: ProgressCallback | None = None,
    *,
    engine: Which = "auto",
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


def generate_tokens(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 256,
    progress: ProgressCallback | None = None,
    *,
    engine: Which = "auto",
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
    batches = planned(model, encoder, unique, Sampling(max_new_tokens=max_new_tokens), batch_size)
    answers: dict[int, list[int]] = {}

    def keep(found: dict[int, list[int]]) -> None:
        answers.update(found)
        if progress is not None:
            progress("generate", len(prompts) * len(answers) // len(unique), len(prompts))

    if engine == "paged":
        require_paged(model)
    if engine == "paged" or (engine == "auto" and pays(model)):
        rooms = {i: batch.max_new_tokens for batch in batches for i in batch.indices}
        allowed = [rooms[index] for index in range(len(unique))]
        try:
            for index, decoded in paged_answers(model, encoder, unique, allowed, batch_size):
                keep({index: decoded.token_ids})
        except EngineError as fault:
            raise InputError(str(fault)) from fault
    else:
        for batch, found in decoded_batches(model, encoder, unique, batches, lambda _: greedy):
            keep({i: said.token_ids for i, said in zip(batch.indices, found, strict=True)})
    numbers = {prompt: index for index, prompt in enumerate(unique)}
    return [list(answers[numbers[tuple(prompt)]]) for prompt in prompts]
