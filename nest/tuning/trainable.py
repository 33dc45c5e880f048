"""What the training loop can train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Trainable(Protocol):
    """A few parameters on a frozen model: the cluster update, or a baseline's adapter."""

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, gradients clipped together."""
        ...

    def removed(self) -> AbstractContextManager[None]:
        """The base model for the time of the block."""
        ...

    def gradients(self) -> Mapping[str, Tensor]:
        """Gradients of all parameters, by the name of the place they belong to."""
        ...

    def snapshot(self) -> list[Tensor]:
        """Copies of the parameters."""
        ...

    def load_snapshot(self, values: Sequence[Tensor]) -> None:
        """Set the parameters, and whatever follows from them."""
        ...
