"""What a patch holds: the update, the neurons, and what its model looked like without and with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nest.errors import PatchError
from nest.models.fingerprint import ModelFingerprint
from nest.patches.revert_bits import delta_rows
from nest.selection.selection import NeuronSelection, SiteSelection
from nest_kernels.neuron_adamw import updated_rows


@dataclass(frozen=True, repr=False)
class PatchData:
    """A trained update: W'[i] = cast(W[i] + s_i U[c(i)]) for the selected rows i.

    Attributes:
        selection: The neurons; its profiles are not kept.
        vectors: U, fp32 (K, D), for each group of sites.
        loadings: s, fp32 (N,), for each site; None for the shared form.
        base: Fingerprint of the model without the patch, touched tensors only.
        folded: For each touched parameter the sha256 of its bytes with the patch.
        revert_bits: For each site what restores the original rows exactly (see `revert_bits.py`).
        row_checksums: Of all selected rows without and with the patch (`LiveRows.checksum`).
        provenance: How it was made: model, config, seeds, hashes, versions, figures.
    """

    selection: NeuronSelection
    vectors: Mapping[str, Tensor]
    loadings: Mapping[str, Tensor] | None
    base: ModelFingerprint
    folded: Mapping[str, str]
    revert_bits: Mapping[str, bytes]
    row_checksums: tuple[int, int]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.update}, {self.n_rows} rows at "
            f"{len(self.selection.sites)} sites, "
            f"{self.trainable_parameters} trained parameters)"
        )

    def __post_init__(self) -> None:
        check_update(self.selection, self.vectors, self.loadings)
        touched = set(self.parameters)
        if set(self.base.tensors) != touched or set(self.folded) != touched:
            raise PatchError(
                f"the patch changes {sorted(touched)} but carries hashes of "
                f"{sorted(self.base.tensors)} and {sorted(self.folded)}; write it again"
            )
        if set(self.revert_bits) != {part.site.name for part in self.selection.sites}:
            raise PatchError("the patch lacks the revert bits of some of its sites; write it again")

    @property
    def update(self) -> str:
        """`shared` (the paper's form) or `loaded`."""
        return "shared" if self.loadings is None else "loaded"

    @property
    def parameters(self) -> dict[str, tuple[SiteSelection, ...]]:
        """The touched parameters, each with its sites."""
        return by_parameter(self.selection.sites)

    @property
    def has_effect(self) -> bool:
        """Whether any bit of any row changes."""
        return self.row_checksums[0] != self.row_checksums[1]

    @property
    def n_rows(self) -> int:
        """How many rows (neurons) the patch changes."""
        return self.selection.n_neurons

    @property
    def trainable_parameters(self) -> int:
        """How many numbers were trained."""
        return self.selection.trainable_parameters("shared" if self.loadings is None else "loaded")

    def delta(self, site: str) -> Float[Tensor, "N D"]:
        """What is added to each selected row of a site, fp32, by site name.

        Raises:
            PatchError: the patch has no such site.
        """
        for part in self.selection.sites:
            if part.site.name == site:
                return self.delta_of(part)
        names = ", ".join(part.site.name for part in self.selection.sites)
        raise PatchError(f"the patch has no site {site!r}; it has {names}")

    def delta_of(self, part: SiteSelection) -> Float[Tensor, "N D"]:
        """What is added to each selected row of one of its sites, fp32."""
        return part_delta(part, self.vectors, self.loadings)


def by_parameter(parts: Sequence[SiteSelection]) -> dict[str, tuple[SiteSelection, ...]]:
    """The touched parameters, each with its sites."""
    touched: dict[str, tuple[SiteSelection, ...]] = {}
    for part in parts:
        touched[part.site.parameter] = (*touched.get(part.site.parameter, ()), part)
    return touched


def part_delta(
    part: SiteSelection, vectors: Mapping[str, Tensor], loadings: Mapping[str, Tensor] | None
) -> Tensor:
    """What an update adds to the rows of one site."""
    own = None if loadings is None else loadings[part.site.name]
    return delta_rows(vectors[part.group], part.clusters, own)


def part_updated(
    part: SiteSelection,
    rows: Tensor,
    vectors: Mapping[str, Tensor],
    loadings: Mapping[str, Tensor] | None,
) -> Tensor:
    """The rows of one site with an update in them.

    Raises:
        PatchError: they are not finite in the weights' dtype.
    """
    own = None if loadings is None else loadings[part.site.name]
    new = updated_rows(rows, vectors[part.group], part.clusters, own)
    if not bool(torch.isfinite(new).all()):
        raise PatchError(
            f"the update at {part.site.name} gives rows that are not finite in {rows.dtype}; train "
            "it with a smaller learning rate, or in bfloat16 or float32"
        )
    return new


def check_update(
    selection: NeuronSelection,
    vectors: Mapping[str, Tensor],
    loadings: Mapping[str, Tensor] | None,
) -> None:
    """Vectors and loadings are those of the selection: names, shapes, finite numbers.

    Raises:
        PatchError: otherwise.
    """
    wanted: dict[str, tuple[int, ...]] = {f"vectors of {g}": k for g, k in selection.groups.items()}
    given = {f"vectors of {name}": values for name, values in vectors.items()}
    if loadings is not None:
        wanted |= {f"loadings of {p.site.name}": (p.neurons.numel(),) for p in selection.sites}
        given |= {f"loadings of {name}": values for name, values in loadings.items()}
    for name in sorted(set(wanted) ^ set(given)):
        problem = "lacks the" if name in wanted else "has, beside its selection,"
        raise PatchError(f"the update {problem} {name}; make both from one selection")
    for name, values in given.items():
        if tuple(values.shape) != wanted[name]:
            raise PatchError(
                f"the {name} have shape {tuple(values.shape)}; the selection asks for "
                f"{wanted[name]}"
            )
        if not bool(torch.isfinite(values).all()):
            raise PatchError(f"the {name} hold NaN or infinity; train the update again")
