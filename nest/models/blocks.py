"""A model's blocks: which one a site is in, starting at one of them, and checkpointing them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nest.models.sites import NeuronSite
from nest.models.wrappers import submodule


@dataclass(frozen=True, eq=False)
class Blocks:
    """The list of blocks that a model runs one after the other.

    Attributes:
        path: Of the list, from the model's root.
        modules: The blocks.
        lowest: Index of the lowest block that holds a site.
    """

    path: str
    modules: tuple[nn.Module, ...]
    lowest: int


def enclosing_blocks(model: nn.Module, path: str) -> list[tuple[str, int]]:
    """The `nn.ModuleList`s that a module is inside of, outermost first, and its index in each."""
    found: list[tuple[str, int]] = []
    parts = path.split(".")
    for i, part in enumerate(parts):
        parent = ".".join(parts[:i])
        if part.isdigit() and isinstance(submodule(model, parent), nn.ModuleList):
            found.append((parent, int(part)))
    return found


def blocks_of(model: nn.Module, sites: Sequence[NeuronSite]) -> Blocks | None:
    """The blocks that these sites are in; None where they are not all in one list of blocks."""
    places = [enclosing_blocks(model, site.module)[:1] for site in sites]
    stacks = {place[0][0] for place in places if place}
    if len(stacks) != 1 or not all(places):
        return None
    (path,) = stacks
    indices = [place[0][1] for place in places]
    return Blocks(path, tuple(submodule(model, path).children()), min(indices))


@contextmanager
def started_at(
    blocks: Blocks, first: int, hidden_states: Float[Tensor, "B T D"], *, as_tuple: bool
) -> Iterator[None]:
    """Inside the block the model's forward pass begins at block `first`.

    What comes before the blocks (embeddings, masks, positions) still runs; blocks 0 to `first` - 1 hand
    on what they are given, and block `first` gets `hidden_states`, whatever it is called with.

    Args:
        blocks: Of the model.
        first: At least 1.
        hidden_states: What block `first` - 1 gave for the same input ids.
        as_tuple: Whether blocks return a tuple that begins with the hidden states.
    """

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states,) if as_tuple else states

    def give(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (hidden_states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden_states}

    with _forward_replaced(blocks.modules[:first], lambda _own: hand_on):
        handle = blocks.modules[first].register_forward_pre_hook(give, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def checkpointed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the block these modules keep their inputs only, and run again in the backward pass.

    Non-reentrant, and in any mode: transformers' own switch works in training mode alone, and tuning
    runs in eval mode. Random numbers are not replayed, since nothing draws any.
    """

    def wrapped(own: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return own(*args, **kwargs)
            return checkpoint(own, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    with _forward_replaced(modules, wrapped):
        yield


@contextmanager
def _forward_replaced(modules: Sequence[nn.Module], make: Any) -> Iterator[None]:
    """Modules run `make(forward)` for the time of the block; hooks stay as they are."""
    held = [(module, module.__dict__.get("forward")) for module in modules]
    try:
        for module in modules:
            module.forward = make(module.forward)
        yield
    finally:
        for module, own in held:
            module.__dict__.pop("forward", None)
            if own is not None:  # accelerate keeps its wrapper there
                module.forward = own
