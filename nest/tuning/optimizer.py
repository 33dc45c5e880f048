"""AdamW whose state is the cluster update's alone, and whose step writes the model's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nest.errors import ActivationError, InputError
from nest.tuning.update import ClusterUpdate, is_finite
from nest_kernels.neuron_adamw import neuron_adamw


class NeuronAdamW(torch.optim.Optimizer):
    """AdamW on a cluster update; after each step the model's rows hold cast(W0 + s U[c]).

    The maths is `nest_kernels.neuron_adamw`; on CUDA a step is one kernel launch. It works under
    torch's learning rate schedulers, gradient accumulation,
    `torch.nn.utils.clip_grad_norm_(update.parameters(), ...)`, transformers' Trainer
    (`optimizers=(NeuronAdamW(update), None)`) and accelerate. Learning rate and step count are scalars
    on the device, so that a step can be captured in a CUDA graph after a first step outside of it.

    Args:
        update: From `nest.trainable`.
        lr: Learning rate; a number, or a tensor with one.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, on the vectors only.

    Raises:
        InputError: something else than an update, or a setting out of range.
    """

    def __init__(
        self,
        update: ClusterUpdate,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not isinstance(update, ClusterUpdate):
            raise InputError(
                f"NeuronAdamW trains a cluster update, not {type(update).__name__}; give it what "
                "nest.trainable(...) yields, and other parameters an optimizer of their own"
            )
        in_range = float(lr) >= 0 and eps >= 0 and weight_decay >= 0
        if not in_range or not all(0 <= beta < 1 for beta in betas):
            raise InputError(
                f"lr {float(lr)}, betas {betas}, eps {eps}, weight_decay {weight_decay}: none may be "
                "negative, and betas must be below 1"
            )
        self.update = update
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(update.parameters(), defaults)
        self._rate()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the update's own parameter is taken.

        Raises:
            InputError: another parameter.
        """
        parameters = param_group["params"]
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if len(parameters) != 1 or parameters[0] is not self.update.packed:
            raise InputError(
                "NeuronAdamW takes the parameter of its update and no other; give other parameters "
                "an optimizer of their own"
            )
        super().add_param_group({**param_group, "params": parameters})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step from the gathered gradient, and the rows that follow from it.

        Without a gradient nothing happens, as in torch's optimizers.

        Raises:
            SelectionError: the model's weights were replaced or moved since the update was prepared.
            ActivationError: the gradient, or what the step would make of the update, is not finite; the
                update is then as it was before (on the CPU; on a GPU `ClusterUpdate.patch` tells).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        packed = self.update.packed
        if packed.grad is None:
            return loss
        self.update.check_weights()
        if packed.is_cpu and not is_finite(packed.grad):
            raise ActivationError(
                "the update's gradient is not finite, and no step was taken: update.patch() gives the "
                "update as it is. Lower the learning rate, clip the gradient, or train in float32"
            )
        group = self.param_groups[0]
        state = self._prepared_state()
        neuron_adamw(
            self.update.rows,
            packed.detach(),
            packed.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            self._rate(),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            n_decayed=self.update.n_vector_parameters,
        )
        self.update.rows_written()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict`, of whatever device it was saved on.

        Raises:
            InputError: it belongs to an update of another size.
        """
        for state in state_dict["state"].values():
            found = tuple(state["exp_avg"].shape) if "exp_avg" in state else "another optimizer"
            if found != tuple(self.update.packed.shape):
                raise InputError(
                    f"the optimizer's state is for {found} numbers and the update has "
                    f"{tuple(self.update.packed.shape)}; it belongs to another selection or form"
                )
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["step"] = state["step"].to(self.update.packed.device, torch.float32)
        self._rate()

    def _prepared_state(self) -> dict[str, Tensor]:
        packed = self.update.packed
        state: dict[str, Tensor] = self.state[packed]
        if not state:
            state["step"] = torch.zeros((), device=packed.device)
            state["exp_avg"] = torch.zeros_like(packed)
            state["exp_avg_sq"] = torch.zeros_like(packed)
        return state

    def _rate(self) -> Tensor:
        """The learning rate as a scalar on the device, whatever a user or scheduler made of it."""
        group, like = self.param_groups[0], self.update.packed
        rate = group["lr"]
        fits = isinstance(rate, Tensor) and not rate.ndim
        if not fits or rate.device != like.device or rate.dtype != like.dtype:
            value = torch.as_tensor(rate, dtype=like.dtype)
            group["lr"] = value.reshape(()).to(like.device)
        scalar: Tensor = group["lr"]
        return scalar
