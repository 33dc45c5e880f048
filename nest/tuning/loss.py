"""The loss of tuning: refusals, benign answers, and how far benign answers drift from the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nest.errors import LayoutError
from nest.models.chat import Batch, logits_of, run_model
from nest.tuning.dialogues import Example, MicroBatch
from nest.tuning.protocol import Trainable

# Base predictions are kept for the next epoch up to this much; beyond it they are computed again.
CACHE_BOUND_BYTES = 512 * 1024**2


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


def tuning_loss(
    logits: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    benign: Bool[Tensor, " N"],
    base: Float[Tensor, "M V"] | None,
    *,
    benign_weight: float,
    kl_weight: float,
) -> Float[Tensor, ""]:
    """Summed over response tokens, in fp32 (fp64 for fp64 logits):

        sum CE(refusals) + benign_weight sum CE(answers) + kl_weight sum KL(base || tuned; answers)

    Args:
        logits: At the tokens before the targets.
        targets: Response tokens.
        benign: Which of them belong to benign answers; M of them do.
        base: Log-probabilities of the base model at the benign ones; None leaves the KL out.
        benign_weight: Of benign answers; refusals weigh 1.
        kl_weight: Of the KL.

    Source: arXiv 2602.16835, section 3.5; the KL term after arXiv 2601.23143.
    """
    log_probs = _wide(logits).log_softmax(-1)
    losses = F.nll_loss(log_probs, targets, reduction="none")  # (N,)
    loss = torch.where(benign, benign_weight * losses, losses).sum()
    if base is not None:
        loss = loss + kl_weight * (base.exp() * (base - log_probs[benign])).sum()
    return loss


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class BasePredictions:
    """What the base model predicts at the response tokens of benign dialogues, each computed once.

    Args:
        ask: The forward pass.
        update: Taken out while the base is asked.
        bound_bytes: Most bytes kept.
    """

    def __init__(
        self,
        ask: Callable[[MicroBatch], Targets],
        update: Trainable,
        bound_bytes: int = CACHE_BOUND_BYTES,
    ) -> None:
        self._forward, self._update = ask, update
        self._bound_bytes, self._kept_bytes = bound_bytes, 0
        self._kept: dict[Example, Tensor] = {}

    @torch.no_grad()
    def of(self, micro_batches: Sequence[MicroBatch]) -> list[Float[Tensor, "M V"]]:
        """For each micro-batch the log-probabilities at its benign rows' targets, row by row."""
        missing = [mb for mb in micro_batches if any(e not in self._kept for e in mb.benign_rows)]
        fresh: dict[Example, Tensor] = {}
        if missing:
            with self._update.removed():
                for micro_batch in missing:
                    fresh |= self._ask(micro_batch)
        for example, values in fresh.items():
            size = values.numel() * values.element_size()
            if example not in self._kept and self._kept_bytes + size <= self._bound_bytes:
                self._kept[example] = values
                self._kept_bytes += size
        return [
            torch.cat([fresh[e] if e in fresh else self._kept[e] for e in mb.benign_rows])
            if mb.benign_rows
            else torch.empty(0, 0)
            for mb in micro_batches
        ]

    def _ask(self, micro_batch: MicroBatch) -> dict[Example, Tensor]:
        only_benign = micro_batch.only_benign()
        logits, _, rows = self._forward(only_benign)
        log_probs = _wide(logits).log_softmax(-1)
        return {example: log_probs[rows == i] for i, example in enumerate(only_benign.examples)}
