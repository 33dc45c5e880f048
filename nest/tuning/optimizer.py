"""AdamW whose state is the cluster update's alone, and whose step writes the model's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nest.errors import InputError
from nest.tuning.update import ClusterUpdate
from nest_kernels.neuron_adamw import adamw_step


class NeuronAdamW(torch.optim.Optimizer):
    """AdamW on a cluster update; after each step the model's rows hold cast(W0 + s U[c]).

    The maths is `nest_kernels.neuron_adamw.adamw_step`. It works under torch's learning rate
    schedulers and `torch.nn.utils.clip_grad_norm_(update.parameters(), ...)`. A loop that clears
    gradients by `model.zero_grad()` alone, as transformers' Trainer does, does not clear this one:
    call the optimizer's.

    Args:
        update: From `nest.trainable`.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, on the vectors only.

    Raises:
        InputError: a setting out of range.
    """

    def __init__(
        self,
        update: ClusterUpdate,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        in_range = lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= b < 1 for b in betas)
        if not in_range:
            raise InputError(
                f"lr {lr}, betas {betas}, eps {eps}, weight_decay {weight_decay}: none may be negative, "
                "and betas must be below 1"
            )
        self.update = update
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(update.parameters(), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step from the gathered gradient, and the rows that follow from it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        packed = self.update.packed
        assert packed.grad is not None
        state: dict[str, Any] = self.state[packed]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(packed)
            state["exp_avg_sq"] = torch.zeros_like(packed)
        state["step"] += 1
        adamw_step(
            packed.data,
            packed.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            step=int(state["step"]),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            n_decayed=self.update.n_vector_parameters,
        )
        self.update.write()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradient; it stays allocated, since the update's views share it."""
        self.update.zero_grad()
