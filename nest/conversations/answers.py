"""What a model says at the tokens of answers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nest.conversations.batches import Batch
from nest.errors import LayoutError
from nest.models.calls import logits_of, run_model


class Targets(NamedTuple):
    """What a model says about the response tokens of a batch.

    Attributes:
        logits: At the tokens before them.
        tokens: The response tokens.
        rows: The batch's rows that they stand in.
    """

    logits: Float[Tensor, "N V"]
    tokens: Int[Tensor, " N"]
    rows: Int[Tensor, " N"]


def target_logits(model: nn.Module, batch: Batch, device: torch.device) -> Targets:
    """One forward pass; the head runs at the positions that predict a response token and no other.

    The head is narrowed by a hook on the model's output embeddings, so that what follows it (a soft
    cap, a scale) follows still. A model that does not name its head computes all logits.
    """
    ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
    wanted = torch.zeros_like(batch.completion_mask)  # (B, T)
    wanted[:, :-1] = batch.completion_mask[:, 1:]
    narrowed = False

    def narrow(_head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal narrowed
        states = args[0] if args else None
        if not isinstance(states, Tensor) or states.shape[:2] != wanted.shape:
            return None
        narrowed = True
        return (states[wanted.to(states.device)][None], *args[1:])  # (1, N, D)

    head = _head_of(model)
    handle = None if head is None else head.register_forward_pre_hook(narrow)
    try:
        logits = logits_of(run_model(model, ids, mask, use_cache=False))
    finally:
        if handle is not None:
            handle.remove()
    home = logits.device
    # Narrowed logits are one row; a head that serves something else first leaves the last ones whole.
    narrowed &= logits.shape[:2] == (1, int(wanted.sum()))
    if not narrowed and logits.shape[:2] != wanted.shape:
        raise LayoutError(
            f"the model returned logits of shape {tuple(logits.shape)} for tokens of shape "
            f"{tuple(wanted.shape)}; expected one vector a token"
        )
    chosen = logits[0] if narrowed else logits[wanted.to(home)]  # (N, V)
    tokens = batch.input_ids[batch.completion_mask].to(home)
    return Targets(chosen, tokens, wanted.nonzero()[:, 0].to(home))


def _head_of(model: nn.Module) -> nn.Module | None:
    named = getattr(model, "get_output_embeddings", None)
    head = named() if callable(named) else None
    return head if isinstance(head, nn.Module) else None


def log_probs_of(logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """Log-probabilities in fp32 (fp64 for fp64 logits)."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def kl_divergence(base: Float[Tensor, "N V"], log_probs: Float[Tensor, "N V"]) -> Float[Tensor, ""]:
    """KL(base || model) in nats, summed over tokens, from the log-probabilities of both."""
    return (base.exp() * (base - log_probs)).sum()
