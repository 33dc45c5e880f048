"""The loss of tuning: refusals, benign answers, and how far benign answers drift from the base."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nest.models.chat import Batch, logits_of, run_model
from nest.tuning.dialogues import Example, MicroBatch
from nest.tuning.protocol import Trainable

# Base predictions are kept for the next epoch up to this much; beyond it they are computed again.
CACHE_BOUND_BYTES = 512 * 1024**2


def target_logits(
    model: nn.Module, batch: Batch, device: torch.device
) -> tuple[Float[Tensor, "N V"], Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Logits that predict a batch's response tokens, those tokens, and the rows they stand in."""
    ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
    wanted = batch.completion_mask[:, 1:]  # (B, T - 1)
    extra: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        # From the first position that predicts a target on; the vocabulary's logits are large.
        first = int(wanted.any(dim=0).nonzero()[0])
        wanted = wanted[:, first:]
        extra["logits_to_keep"] = wanted.shape[1] + 1
    logits = logits_of(run_model(model, ids, mask, **extra))[:, :-1]
    wanted = wanted.to(logits.device)
    targets = ids.to(logits.device)[:, -wanted.shape[1] :][wanted]
    return logits[wanted], targets, wanted.nonzero()[:, 0]


def tuning_loss(
    logits: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    benign: Bool[Tensor, " N"],
    base: Float[Tensor, "M V"] | None,
    *,
    benign_weight: float,
    kl_weight: float,
) -> Float[Tensor, ""]:
    """Summed over response tokens, in fp32:

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
    log_probs = logits.float().log_softmax(-1)
    losses = F.nll_loss(log_probs, targets, reduction="none")  # (N,)
    loss = torch.where(benign, benign_weight * losses, losses).sum()
    if base is not None:
        loss = loss + kl_weight * (base.exp() * (base - log_probs[benign])).sum()
    return loss


class BasePredictions:
    """What the base model predicts at the response tokens of benign dialogues, each computed once.

    Args:
        model: Carries the update.
        update: Taken out while the base is asked.
        device: Where batches go.
        bound_bytes: Most bytes kept.
    """

    def __init__(
        self,
        model: nn.Module,
        update: Trainable,
        device: torch.device,
        bound_bytes: int = CACHE_BOUND_BYTES,
    ) -> None:
        self._model, self._update, self._device = model, update, device
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
        logits, _, rows = target_logits(self._model, only_benign.batch, self._device)
        log_probs = logits.float().log_softmax(-1)
        return {example: log_probs[rows == i] for i, example in enumerate(only_benign.examples)}
