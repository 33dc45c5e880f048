"""Greedy decoding by the continuous batching of transformers, over a paged key-value cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from nest.conversations.conversation import Conversation
from nest.conversations.encoders import Encoder
from nest.errors import EngineError, InputError
from nest.generation.asked import Asked, identity_of
from nest.generation.decoding import Decoded
from nest.generation.engine import Completion
from nest.generation.sampling import Sampling
from nest.models.modes import eval_mode
from nest.progress import ProgressCallback

PAGE_TOKENS = 32
"""Tokens of a prompt are shared with others, and room is handed out, in pages of this size."""

TOKENS_PER_CALL = 512
"""Most tokens a forward call without flash attention, whose mask has an entry for every held token."""


def why_not_paged(model: nn.Module) -> str | None:
    """Why a model cannot be decoded with a paged cache, or None where it can."""
    base = _unwrapped(model)
    config = getattr(base, "config", None)
    if config is None or not hasattr(base, "continuous_batching_context_manager"):
        return f"{type(base).__name__} is no transformers model with continuous batching"
    if not getattr(base, "_supports_attention_backend", False):
        return f"{type(base).__name__} takes no other attention than its own"
    attention = str(getattr(config, "_attn_implementation", None))
    if not _is_flash(base) and attention not in ("sdpa", "eager"):
        return f"its attention is {attention}; expected sdpa, eager or flash attention"
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])
    other = sorted(kinds - {"full_attention", "sliding_attention"})
    if other:
        return f"it has layers of the kind {', '.join(other)}, which keep no keys and values"
    if len({parameter.device for parameter in base.parameters()}) > 1:
        return "its layers lie on several devices"
    return None


def pays(model: nn.Module) -> bool:
    """Whether to page without being asked to: on a GPU, for a model with flash attention.

    With any other attention all sequences stand in one row, and every token is compared with those
    of all others under a mask: on one core, 150 prompts of the demo take 3.0 to 3.6 s paged and 0.9 s
    in static batches. That flash attention pays is what it is made for; it was not measured here.
    """
    base = _unwrapped(model)
    on_gpu = next(base.parameters()).device.type == "cuda"
    return on_gpu and why_not_paged(model) is None and _is_flash(base)


def require_paged(model: nn.Module) -> None:
    """Refuse a model that cannot be decoded with a paged cache.

    Raises:
        InputError: `why_not_paged` says why.
    """
    fault = why_not_paged(model)
    if fault is not None:
        raise InputError(f"the paged engine cannot decode this model: {fault}; use engine static")


class PagedEngine:
    """Greedy answers of a model in this process, by the continuous batching of transformers.

    What is skipped is not decoded, and what is decoded together rounds otherwise without it: a run that is
    gone on with gives the same answers short of a tie. Stop texts cut answers that are decoded to their
    end.

    Args:
        model: `why_not_paged` is None.
        encoder: Turns conversations into tokens and tokens into text.
        batch_size: Most answers decoded at once.
        progress: Called as `progress("generate", answers done, answers)`.

    Raises:
        InputError: a batch size below 1, or a model that cannot be decoded so.
    """

    name = "paged"

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
        require_paged(model)
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
        """Answers in the order of their prompts' tokens.

        Args:
            conversations: Each ends with a user turn; of those with the same tokens one is answered.
            sampling: Greedy.
            skip: (conversation, sample) pairs that are not wanted.

        Raises:
            InputError: a temperature, a conversation that the encoder refuses, or one that fills the
                context.
            EngineError: transformers failed to decode.
        """
        if not sampling.is_greedy:
            raise InputError(
                f"the paged engine decodes greedily only, and the temperature is {sampling.temperature}; "
                "use the static engine, which draws answers"
            )
        asked = Asked(self._encoder, conversations, sampling, skip)
        full = [p for p in asked.prompts if self._room(p, sampling) < 1]
        if full:
            raise InputError(
                f"a prompt has {len(full[0])} tokens and the model's context {self._encoder.max_tokens}; "
                "shorten the prompt so that an answer fits"
            )
        return self._completions(asked, sampling)

    def _room(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """Most tokens of an answer."""
        context = self._encoder.max_tokens
        most = sampling.max_new_tokens
        return most if context is None else min(most, context - len(prompt))

    def _completions(self, asked: Asked, sampling: Sampling) -> Iterator[Completion]:
        numbers = range(len(asked.prompts))
        wanted = [number for number in numbers if asked.is_wanted([number], range(1))]
        if not wanted:
            return
        prompts = [asked.prompts[number] for number in wanted]
        rooms = [self._room(prompt, sampling) for prompt in prompts]
        done = asked.total - asked.n_askers(wanted)
        # as `paged_answers` begins them
        waiting = deque(sorted(range(len(wanted)), key=prompts.__getitem__))
        found: dict[int, Decoded] = {}
        answers = paged_answers(self._model, self._encoder, prompts, rooms, self._batch_size)
        for place, decoded in answers:
            found[place] = decoded
            done += asked.n_askers([wanted[place]])
            if self._progress is not None:
                self._progress("generate", done, asked.total)
            while waiting and waiting[0] in found:
                first = waiting.popleft()
                yield from asked.completions(wanted[first], 0, found.pop(first))


def paged_answers(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    allowances: Sequence[int],
    batch_size: int,
) -> Iterator[tuple[int, Decoded]]:
    """Greedy answers with the numbers of their prompts, as they are done.

    Global random states and the model's attention are as before afterwards.

    Args:
        model: `why_not_paged` is None; run in eval mode.
        encoder: For the end-of-sequence tokens.
        prompts: Token ids, none twice and at least one.
        allowances: Most new tokens of each.
        batch_size: Most prompts decoded at once.

    Raises:
        EngineError: transformers failed to decode.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    base = _unwrapped(model)
    longest = max(map(len, prompts)) + max(allowances)
    page_size = 256 if _is_flash(base) else PAGE_TOKENS  # flash attention takes no smaller pages
    n_rows = min(batch_size, len(prompts))
    settings = ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=(longest // page_size + 2) * n_rows,
        max_batch_tokens=None if _is_flash(base) else max(TOKENS_PER_CALL, n_rows),
        max_requests_per_batch=n_rows,
        auto_switch_to_flash=False,  # the model's own attention, so that its answers are its own
    )
    eos = sorted(encoder.eos_ids) or [-1]
    config = GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=encoder.pad_id)
    n_done = 0
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        seeding = stack.enter_context(ExitStack())
        seeding.enter_context(_random_state_kept(next(base.parameters()).device))
        manager = stack.enter_context(
            base.continuous_batching_context_manager(
                generation_config=config, continuous_batching_config=settings, warmup=False
            )
        )
        # neighbours in this order share the pages of their common beginnings
        for index in sorted(range(len(prompts)), key=lambda index: tuple(prompts[index])):
            manager.add_request(
                list(prompts[index]), request_id=str(index), max_new_tokens=allowances[index]
            )
        while n_done < len(prompts):
            result = manager.get_result(timeout=1)
            if result is None and manager.is_running():
                continue
            if result is None or result.error is not None:
                said = "its thread ended" if result is None else result.error
                raise EngineError(
                    f"the paged engine of transformers failed ({said}); use the static engine"
                )
            seeding.close()  # its thread has seeded by now, and the caller may draw between answers
            if result.is_finished():
                n_done += 1
                yield int(result.request_id), _before(result.generated_tokens, encoder.eos_ids)


def _unwrapped(model: nn.Module) -> Any:
    unwrap = getattr(model, "get_base_model", None)  # PEFT's wrapper
    return unwrap() if callable(unwrap) else model


def _is_flash(base: Any) -> bool:
    return "flash" in str(getattr(base.config, "_attn_implementation", ""))


def _before(tokens: Sequence[int], eos_ids: frozenset[int]) -> Decoded:
    ends = [place for place, token in enumerate(tokens) if token in eos_ids]
    kept = tokens[: ends[0]] if ends else tokens
    return Decoded([int(token) for token in kept], bool(ends))


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """transformers seeds torch when it starts, though nothing is sampled."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
