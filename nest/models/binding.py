"""Sites found in a model: the module, the weight, and its rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nest.errors import LayoutError
from nest.models.sites import NeuronSite, neuron_view, read_rows, write_rows
from nest.models.wrappers import submodule

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of weights whose rows can be read and written."""


@dataclass(frozen=True, eq=False)
class BoundSite:
    """A site of one model.

    Attributes:
        site: Where it is.
        module: Whose output holds the neurons' activations; hooks go on it.
        parent: The module that holds it.
        child: Its name there.
    """

    site: NeuronSite
    module: nn.Module
    parent: nn.Module
    child: str

    @property
    def held(self) -> object:
        """What the module has under the tensor's name now: a weight, a quantised one, or nothing."""
        return getattr(self.module, self.site.tensor, None)

    @property
    def weight(self) -> Tensor:
        """The weight whose rows (or columns) are the site's neurons, checked against the site.

        Raises:
            LayoutError: missing, not two-dimensional, or too small for the site's neurons.
        """
        return checked_weight(self.site, self.held)

    @property
    def is_plain(self) -> bool:
        """Whether the weight's rows can be read and written: in memory, whole and in a float format."""
        weight = self.held
        return (
            isinstance(weight, Tensor)
            and type(weight) in (Tensor, nn.Parameter)
            and weight.device.type != "meta"
            and weight.dtype in FLOATS
            and weight.ndim == 2
        )

    @property
    def is_in_place(self) -> bool:
        """Whether the model still runs this very module there."""
        return self.parent._modules.get(self.child, self.module) is self.module

    @property
    def width(self) -> int:
        """Length D of the weight vectors of the site's neurons."""
        return int(self.weight.shape[1 - self.site.axis])

    def view(self) -> Float[Tensor, "F D"]:
        """The weight's own memory, one neuron a row."""
        return neuron_view(self.weight, self.site)

    def read(self, neurons: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """A copy of the weight vectors of these neurons."""
        return read_rows(self.weight, self.site, neurons)

    def write(self, neurons: Int[Tensor, " N"], rows: Float[Tensor, "N D"]) -> None:
        """Replace the weight vectors of these neurons in place, wherever the weight is by now."""
        write_rows(self.weight, self.site, neurons, rows)

    def device(self, model: nn.Module) -> torch.device:
        """Where the module computes: its own weights' device, or that of the model's where it has none."""
        for parameter in (*self.module.parameters(recurse=False), *model.parameters()):
            if parameter.device.type != "meta":
                return parameter.device
        return torch.device("cpu")


def bind(model: nn.Module, site: NeuronSite) -> BoundSite:
    """Find a site's module; its weight is looked at when it is asked for.

    Raises:
        LayoutError: the model has no module of that path.
    """
    parent, _, child = site.module.rpartition(".")
    try:
        return BoundSite(site, submodule(model, site.module), submodule(model, parent), child)
    except AttributeError:
        raise LayoutError(
            f"the model has no module {site.module!r}; describe its projections with "
            "layout=[nest.NeuronSite(layer, projection, module, length), ...]"
        ) from None


def bind_all(model: nn.Module, sites: Iterable[NeuronSite]) -> tuple[BoundSite, ...]:
    """Find the modules of these sites, in their order.

    Raises:
        LayoutError: see `bind`.
    """
    return tuple(bind(model, site) for site in sites)


def checked_weight(site: NeuronSite, weight: object) -> Tensor:
    """The weight, where a site's neurons are in it.

    Raises:
        LayoutError: it is none, not two-dimensional, or too small for the site's neurons.
    """
    if not isinstance(weight, Tensor):
        raise LayoutError(
            f"{site.module} has no tensor {site.tensor!r}; name the weight with "
            "NeuronSite(tensor=...)"
        )
    if weight.ndim != 2 or site.axis not in (0, 1):
        raise LayoutError(
            f"{site.parameter} has shape {tuple(weight.shape)} and axis {site.axis}; "
            "a site needs a two-dimensional weight and axis 0 or 1"
        )
    if site.offset < 0 or site.length < 1 or site.offset + site.length > weight.shape[site.axis]:
        raise LayoutError(
            f"{site.parameter} has {weight.shape[site.axis]} neurons along axis {site.axis}, but "
            f"the site asks for {site.offset} to {site.offset + site.length}"
        )
    return weight
