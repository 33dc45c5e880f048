"""The loss of tuning: refusals, benign answers, and how far benign answers drift from the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from nest.conversations.answers import Targets, kl_divergence, log_probs_of
from nest.tuning.company import FirstCompany
from nest.tuning.dialogues import Example, MicroBatch
from nest.tuning.trainable import Trainable

# Base predictions are kept for the next epoch up to this much; beyond it they are computed again.
CACHE_BOUND_BYTES = 512 * 1024**2


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
    log_probs = log_probs_of(logits)
    losses = F.nll_loss(log_probs, targets, reduction="none")  # (N,)
    loss = torch.where(benign, benign_weight * losses, losses).sum()
    if base is not None:
        loss = loss + kl_weight * kl_divergence(base, log_probs[benign])
    return loss


class BasePredictions:
    """What the base model predicts at the response tokens of benign dialogues, each computed once.

    Args:
        ask: The forward pass.
        update: Taken out while the base is asked.
        bound_bytes: Most bytes kept.

    Attributes:
        bytes_a_token: Of what is kept, once something was computed.
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
        self._earlier = FirstCompany()
        self.bytes_a_token: int | None = None

    @torch.no_grad()
    def of(self, micro_batches: Sequence[MicroBatch]) -> list[Float[Tensor, "M V"]]:
        """For each micro-batch the log-probabilities at its benign rows' targets, row by row."""
        wanted = [e for micro_batch in micro_batches for e in micro_batch.benign_rows]
        complete = all(e in self._kept for e in wanted)
        with nullcontext() if complete else self._update.removed():
            return [self._of_one(micro_batch) for micro_batch in micro_batches]

    def met(self, micro_batch: MicroBatch) -> tuple[Example, ...]:
        """Take note of a micro-batch that an earlier run has asked `of`; nothing is computed.

        Returns:
            The dialogues that the earlier run asked the base model about, together.
        """
        assert self.bytes_a_token is not None
        rows = micro_batch.benign_rows
        new = tuple(e for e in rows if e not in self._kept and e not in self._earlier)
        if new:
            sizes = {e: e.n_targets * self.bytes_a_token for e in new}
            self._earlier.add(new, [e for e, size in sizes.items() if self._has_room(size)])
        return new

    def _of_one(self, micro_batch: MicroBatch) -> Float[Tensor, "M V"]:
        rows = micro_batch.benign_rows
        if not rows:
            return torch.empty(0, 0)
        for group in self._earlier.due(rows):
            again = self._ask(group, micro_batch.pad_id)
            self._kept |= {example: again[example] for example in self._earlier.take(group)}
        new = tuple(e for e in rows if e not in self._kept)
        fresh = self._ask(new, micro_batch.pad_id) if new else {}
        for example, values in fresh.items():
            self.bytes_a_token = values.shape[-1] * values.element_size()
            if self._has_room(values.numel() * values.element_size()):
                self._kept[example] = values
        return torch.cat([fresh[e] if e in fresh else self._kept[e] for e in rows])

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes more are kept; they then are."""
        fits = self._kept_bytes + size <= self._bound_bytes
        self._kept_bytes += fits * size
        return fits

    def _ask(self, examples: Sequence[Example], pad_id: int) -> dict[Example, Tensor]:
        micro_batch = MicroBatch.of(examples, pad_id)
        logits, _, rows = self._forward(micro_batch)
        log_probs = log_probs_of(logits)
        return {example: log_probs[rows == i] for i, example in enumerate(micro_batch.examples)}
