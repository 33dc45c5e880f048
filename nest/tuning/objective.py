"""What the training loop minimises: the supervised loss, or a method's own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from nest.conversations.answers import Targets
from nest.tuning.dialogues import Example, MicroBatch
from nest.tuning.loss import BasePredictions, tuning_loss
from nest.tuning.trainable import Trainable

Keeps = Literal["best", "last"]


@runtime_checkable
class Objective(Protocol):
    """A loss over the micro-batches of a step.

    What it keeps of the base model may depend on which dialogues go through together; to be gone on
    with from a checkpoint to the bit it says so by `met`, `numbers` and `resume`.
    """

    @property
    def keeps(self) -> Keeps:
        """`best`: its validation loss chooses the step; `last`: it says nothing of what is wanted."""
        ...

    @abstractmethod
    def losses(self, micro_batches: Sequence[MicroBatch], step: int) -> Iterator[Float[Tensor, ""]]:
        """For each micro-batch its part of the loss; together they are the loss of the whole step.

        Each is computed when it is asked for, so that the one before can be done with; in the grad mode
        of the caller.

        Args:
            micro_batches: All of a step's, or all that is validated on.
            step: Optimizer steps done, not micro-batches.
        """
        ...

    def met(self, micro_batch: MicroBatch) -> tuple[Example, ...]:
        """Take note of a micro-batch that an earlier run has asked for; nothing is computed.

        Returns:
            The dialogues that the earlier run asked the base model about, together.
        """
        return ()

    def numbers(self) -> Mapping[str, Any]:
        """What a checkpoint holds of it, as plain values."""
        return {}

    def resume(self, numbers: Mapping[str, Any]) -> None:
        """Go on from what `numbers` gave."""
        return


class Supervised(Objective):
    """Cross-entropy of refusals and of benign answers, and KL(base || tuned) on the latter.

    Each is a mean over its kind's response tokens, weighted by the kind's share of tokens.

    Args:
        ask: The forward pass on a micro-batch.
        update: Taken out while the base model is asked.
        benign_weight: Of benign answers; refusals weigh 1.
        kl_weight: Of the KL; 0 never asks the base model.

    Source: arXiv 2602.16835, section 3.5; the KL term after arXiv 2601.23143.
    """

    def __init__(
        self,
        ask: Callable[[MicroBatch], Targets],
        update: Trainable,
        *,
        benign_weight: float,
        kl_weight: float,
    ) -> None:
        self._ask, self._benign_weight, self._kl_weight = ask, benign_weight, kl_weight
        self._base = BasePredictions(ask, update)

    @property
    def keeps(self) -> Keeps:
        """See `Objective`."""
        return "best"

    def losses(self, micro_batches: Sequence[MicroBatch], step: int) -> Iterator[Float[Tensor, ""]]:
        """See `Objective`."""
        n_targets = sum(int(mb.batch.completion_mask.sum()) for mb in micro_batches)
        base = self._base.of(micro_batches) if self._kl_weight > 0 else None
        for i, micro_batch in enumerate(micro_batches):
            logits, targets, rows = self._ask(micro_batch)
            benign = torch.tensor([e.benign for e in micro_batch.examples], device=rows.device)
            has_base = base is not None and bool(micro_batch.benign_rows)
            loss = tuning_loss(
                logits,
                targets,
                benign[rows],
                base[i].to(logits.device) if base is not None and has_base else None,
                benign_weight=self._benign_weight,
                kl_weight=self._kl_weight,
            )
            yield loss / n_targets

    def met(self, micro_batch: MicroBatch) -> tuple[Example, ...]:
        """See `Objective`."""
        return self._base.met(micro_batch) if self._kl_weight > 0 else ()

    def numbers(self) -> Mapping[str, Any]:
        """See `Objective`."""
        return {"bytes_a_token": self._base.bytes_a_token}

    def resume(self, numbers: Mapping[str, Any]) -> None:
        """See `Objective`."""
        self._base.bytes_a_token = numbers["bytes_a_token"]
