"""Where neurons live: a site names one projection's neurons inside one tensor of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nest.errors import LayoutError

_COUNTS = ("layer", "length", "axis", "offset")


@dataclass(frozen=True, order=True)
class NeuronSite:
    """One projection whose output features are neurons.

    Attributes:
        layer: Index of the block, counted from the embeddings.
        projection: Name of the projection inside the block, such as `gate_proj` or `fc1`.
        module: Path of the module from the model's root. Its output, last dimension, holds the
            neurons' activations; its input is what the update's vectors are multiplied with.
        tensor: Name of the weight inside the module.
        axis: Dimension of the weight that counts neurons: 0 for `nn.Linear`, 1 for a transposed
            weight (Conv1D).
        offset: First neuron's index along `axis`, and along the module's output features; more than
            zero for a slice of a fused projection.
        length: Number of neurons (F).
    """

    layer: int
    projection: str
    module: str
    length: int
    tensor: str = "weight"
    axis: int = 0
    offset: int = 0

    def __post_init__(self) -> None:
        for names, kind in ((("projection", "module", "tensor"), str), (_COUNTS, int)):
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise LayoutError(
                        f"NeuronSite.{name} is {value!r}; expected a value of type {kind.__name__}"
                    )

    @property
    def name(self) -> str:
        """Unique key of the site: the module's path, and the slice where it is one of several."""
        return self.module if self.offset == 0 else f"{self.module}[{self.offset}:]"

    @property
    def parameter(self) -> str:
        """Name of the tensor in the model's state dict."""
        return f"{self.module}.{self.tensor}" if self.module else self.tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> NeuronSite:
        """Read what `to_dict` wrote, in this version or one before: fields that are missing have their
        defaults, and entries that are none of a site's are left alone.

        Raises:
            KeyError: a field without a default is missing.
            LayoutError: a value of another type.
        """
        known = {field.name: field for field in fields(NeuronSite)}
        needed = [name for name, field in known.items() if field.default is MISSING]
        given = {name: values[name] for name in needed}
        given |= {name: values[name] for name in known if name in values}
        return NeuronSite(**given)


def neuron_view(weight: Float[Tensor, "R C"], site: NeuronSite) -> Float[Tensor, "F D"]:
    """The weight's own memory with one neuron of the site a row; writing to it writes the weight."""
    rows = weight.detach() if site.axis == 0 else weight.detach().T
    return rows[site.offset : site.offset + site.length]


def read_rows(
    weight: Float[Tensor, "R C"], site: NeuronSite, neurons: Int[Tensor, " N"]
) -> Float[Tensor, "N D"]:
    """A copy of the weight vectors of `neurons`, one row a neuron, detached from autograd."""
    return neuron_view(weight, site).index_select(0, neurons.to(weight.device)).contiguous()


@torch.no_grad()
def write_rows(
    weight: Float[Tensor, "R C"],
    site: NeuronSite,
    neurons: Int[Tensor, " N"],
    rows: Float[Tensor, "N D"],
) -> None:
    """Replace the weight vectors of `neurons` in place; `rows` is cast to the weight's dtype."""
    values = rows.to(device=weight.device, dtype=weight.dtype)
    neuron_view(weight, site).index_copy_(0, neurons.to(weight.device), values)
