"""Greedy decoding by the continuous batching of transformers, over a paged key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nest.conversations.encoders import Encoder
from nest.errors import InputError

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


def decode_paged(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    allowances: Sequence[int],
    batch_size: int,
    done: Callable[[int, list[int]], None],
) -> None:
    """Greedy answers without their end-of-sequence tokens, as they are done.

    Global random states and the model's attention are as before afterwards.

    Args:
        model: In eval mode, and `why_not_paged` is None.
        encoder: For the end-of-sequence tokens.
        prompts: Token ids, none twice.
        allowances: Most new tokens of each.
        batch_size: Most prompts decoded at once.
        done: Called with the number of a prompt and its answer.

    Raises:
        InputError: transformers failed to decode.
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
    greedy = GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=encoder.pad_id)
    n_done = 0
    with (
        _random_state_kept(next(base.parameters()).device),
        base.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=settings, warmup=False
        ) as manager,
    ):
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
                raise InputError(
                    f"the paged engine of transformers failed ({said}); use the static engine"
                )
            if result.is_finished():
                n_done += 1
                done(int(result.request_id), _before(result.generated_tokens, encoder.eos_ids))


def _unwrapped(model: nn.Module) -> Any:
    unwrap = getattr(model, "get_base_model", None)  # PEFT's wrapper
    return unwrap() if callable(unwrap) else model


def _is_flash(base: Any) -> bool:
    return "flash" in str(getattr(base.config, "_attn_implementation", ""))


def _before(tokens: Sequence[int], eos_ids: frozenset[int]) -> list[int]:
    kept: list[int] = []
    for token in tokens:
        if token in eos_ids:
            break
        kept.append(int(token))
    return kept


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """transformers seeds torch when it starts, though nothing is sampled."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
