"""Where activations are read: a site's neurons, or the residual stream after a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from nest.errors import LayoutError
from nest.models.binding import bind
from nest.models.blocks import Blocks, blocks_of
from nest.models.layouts import find_sites
from nest.models.sites import NeuronSite
from nest.models.wrappers import submodule

Read = Callable[[Tensor], None]
"""Gets the activations (..., T, F) of a forward pass: all tokens of a prompt, or the new ones of a step
with a key-value cache."""


@runtime_checkable
class Tap(Protocol):
    """A place in a model where activations are read; it changes nothing."""

    @property
    def name(self) -> str:
        """Unique among the taps of a model."""
        ...

    @property
    def length(self) -> int:
        """How many numbers a token has there (F)."""
        ...

    def module_in(self, model: nn.Module) -> nn.Module:
        """The module whose output is read.

        Raises:
            LayoutError: the model has none there.
        """
        ...

    def values(self, output: Any) -> Float[Tensor, "... F"]:
        """The activations in what the module returned.

        Raises:
            LayoutError: they are not in it.
        """
        ...

    def attach(self, model: nn.Module, read: Read) -> AbstractContextManager[None]:
        """Within the block `read` gets the activations of every forward pass."""
        ...


@dataclass(frozen=True)
class SiteTap:
    """The activations of a site's neurons.

    Attributes:
        site: Where they are.
    """

    site: NeuronSite

    @property
    def name(self) -> str:
        """The site's."""
        return self.site.name

    @property
    def length(self) -> int:
        """Number of neurons."""
        return self.site.length

    def module_in(self, model: nn.Module) -> nn.Module:
        """See `Tap`."""
        return bind(model, self.site).module

    def values(self, output: Any) -> Float[Tensor, "... F"]:
        """See `Tap`; the site's own part of the module's output."""
        if not isinstance(output, Tensor):
            raise LayoutError(
                f"{self.name} returns {type(output).__name__} and no tensor; name the projection itself "
                "with layout=[nest.NeuronSite(...)]"
            )
        if self.site.length == output.shape[-1]:
            return output
        return output[..., self.site.offset : self.site.offset + self.site.length]

    def attach(self, model: nn.Module, read: Read) -> AbstractContextManager[None]:
        """See `Tap`."""
        return attached(self, model, read)


@dataclass(frozen=True)
class ResidualTap:
    """The residual stream: what a block hands on to the next.

    Attributes:
        layer: Index of the block, counted from the embeddings.
        module: Path of the block.
        length: Width of the stream (D).
    """

    layer: int
    module: str
    length: int

    @property
    def name(self) -> str:
        """The block's path."""
        return self.module

    def module_in(self, model: nn.Module) -> nn.Module:
        """See `Tap`."""
        try:
            return submodule(model, self.module)
        except AttributeError:
            raise LayoutError(f"the model has no block {self.module!r}") from None

    def values(self, output: Any) -> Float[Tensor, "... D"]:
        """See `Tap`; of a tuple its first element."""
        states = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(states, Tensor) or states.shape[-1] != self.length:
            raise LayoutError(
                f"the block {self.module} returns {type(output).__name__}; expected hidden states of "
                f"width {self.length}, alone or first in a tuple"
            )
        return states

    def attach(self, model: nn.Module, read: Read) -> AbstractContextManager[None]:
        """See `Tap`."""
        return attached(self, model, read)


def as_tap(place: NeuronSite | Tap) -> Tap:
    """A site as a tap; a tap as it is."""
    return SiteTap(place) if isinstance(place, NeuronSite) else place


def residual_taps(
    model: nn.Module,
    layers: Sequence[int] | None = None,
    *,
    layout: Sequence[NeuronSite] | None = None,
) -> tuple[ResidualTap, ...]:
    """Taps after the blocks of a model.

    Args:
        model: Whose blocks stand in one list.
        layers: Which of them, by index; all if None.
        layout: The model's sites, where they cannot be found from its modules.

    Raises:
        LayoutError: the blocks are not in one list, or there is no such layer.
    """
    if isinstance(layers, int):
        raise LayoutError(f"layers is {layers}; expected a list of them, such as [{layers}]")
    blocks, width = blocks_in(model, layout=layout)
    wanted = range(len(blocks.modules)) if layers is None else layers
    missing = [layer for layer in wanted if not 0 <= layer < len(blocks.modules)]
    if missing:
        raise LayoutError(
            f"the model has the layers 0 to {len(blocks.modules) - 1}, and {missing[0]} was asked for"
        )
    return tuple(ResidualTap(layer, f"{blocks.path}.{layer}", width) for layer in wanted)


def blocks_in(
    model: nn.Module, *, layout: Sequence[NeuronSite] | None = None
) -> tuple[Blocks, int]:
    """The blocks of a model, and the width of the stream between them.

    Raises:
        LayoutError: they are not in one list.
    """
    sites = find_sites(model, layout)
    blocks = blocks_of(model, sites)
    if blocks is None:
        raise LayoutError(
            "the model's blocks are not in one list; the residual stream cannot be found"
        )
    return blocks, bind(model, sites[0]).width


@contextmanager
def attached(tap: Tap, model: nn.Module, read: Read) -> Iterator[None]:
    """A hook on a tap's module for the time of the block."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        read(tap.values(output))

    module = tap.module_in(model)
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
