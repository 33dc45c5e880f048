"""A direction in the residual stream: added to it, or taken out of it, for the time of a block.

No weight is written: hooks change what blocks hand on, and are gone when the block ends, however it
ends. What a hook does to a token depends on that token alone, so that padding, batches and key-value
caches change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nest.activations.taps import ResidualTap, blocks_in, residual_taps
from nest.errors import InputError
from nest.models.sites import NeuronSite

Change = Callable[[Tensor], Tensor]


@contextmanager
def adding(
    model: nn.Module,
    direction: Float[Tensor, " D"],
    strength: float,
    layers: Sequence[int],
    *,
    layout: Sequence[NeuronSite] | None = None,
) -> Iterator[nn.Module]:
    """h + strength * direction after each of these blocks, at every token.

        with adding(model, direction, 4.0, layers=[12]):
            ...

    Args:
        model: Bit for bit as it was after the block.
        direction: As it is, of any length; moved to the states' device and dtype.
        strength: What it is multiplied with; negative ones steer away.
        layers: After which blocks.
        layout: The model's sites, where they cannot be found from its modules.

    Raises:
        InputError: a direction of another width, or not of finite numbers.
        LayoutError: the blocks cannot be found.

    Source: arXiv 2308.10248 (activation addition).
    """
    taps = residual_taps(model, layers, layout=layout)
    _check(direction, taps)

    def change(states: Tensor) -> Tensor:
        return states + (strength * direction).to(states.device, states.dtype)

    with _after(model, taps, change):
        yield model


@contextmanager
def ablating(
    model: nn.Module,
    direction: Float[Tensor, " D"],
    layers: Sequence[int] | None = None,
    *,
    layout: Sequence[NeuronSite] | None = None,
) -> Iterator[nn.Module]:
    """h - (h . v) v, v being the direction at length one, after these blocks, at every token.

    With all layers, the default, it is taken out of what enters the first block as well. Inside a block
    what attention writes along it is still seen by the block's own MLP.

    Args:
        model: Bit for bit as it was after the block.
        direction: Of any length but zero.
        layers: After which blocks; all if None.
        layout: As for `adding`.

    Raises:
        InputError: a direction of another width, of length zero, or not of finite numbers.
        LayoutError: the blocks cannot be found.

    Source: arXiv 2406.11717 (directional ablation).
    """
    taps = residual_taps(model, layers, layout=layout)
    _check(direction, taps)
    length = float(direction.double().norm())
    if length == 0:
        raise InputError("the direction is zero everywhere; there is nothing to take out")
    unit = direction.double() / length

    def change(states: Tensor) -> Tensor:
        wide = torch.promote_types(states.dtype, torch.float32)
        along = unit.to(states.device, wide)
        values = states.to(wide)
        return (values - (values @ along)[..., None] * along).to(states.dtype)

    with ExitStack() as stack:
        if layers is None:
            first = blocks_in(model, layout=layout)[0].modules[0]
            stack.enter_context(_before(first, change))
        stack.enter_context(_after(model, taps, change))
        yield model


def _check(direction: Tensor, taps: Sequence[ResidualTap]) -> None:
    if not taps:
        raise InputError("no layers were given, so that nothing would change; name at least one")
    for tap in taps:
        if direction.shape != (tap.length,):
            raise InputError(
                f"the direction has shape {tuple(direction.shape)}, and the residual stream after "
                f"{tap.name} the width {tap.length}; use one that was made on this model"
            )
    if not bool(torch.isfinite(direction).all()):
        raise InputError("the direction holds NaN or infinity; make it again")


@contextmanager
def _after(model: nn.Module, taps: Sequence[ResidualTap], change: Change) -> Iterator[None]:
    def hook_for(tap: ResidualTap) -> Callable[..., Any]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            changed = change(tap.values(output))
            if isinstance(output, tuple):
                return (changed, *output[1:])
            return [changed, *output[1:]] if isinstance(output, list) else changed

        return hook

    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for tap in taps:
            handles.append(tap.module_in(model).register_forward_hook(hook_for(tap)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _before(block: nn.Module, change: Change) -> Iterator[None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
