"""What a selection's manifest says."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from nest.artifacts.schema import Entry
from nest.models.fingerprint import FingerprintEntry
from nest.models.sites import NeuronSite

Count = Annotated[int, Field(ge=0, lt=2**40)]


class SiteEntry(Entry):
    """A site and how much of it was selected; fields with a default came later or are mostly so."""

    layer: int
    projection: str
    module: str
    length: int
    tensor: str = "weight"
    axis: int = 0
    offset: int = 0
    n_neurons: Count
    width: Count
    group: str
    n_clusters: Count
    n_profiles: Count | None = None

    def site(self) -> NeuronSite:
        """The site alone."""
        return NeuronSite.from_dict(self.model_dump())


class SelectionManifest(Entry):
    """All but the tensors."""

    format_version: str
    base: FingerprintEntry
    sites: list[SiteEntry]
    provenance: dict[str, Any]
    counts: dict[str, int] = Field(default_factory=dict)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that it announces."""
        shapes: dict[str, tuple[int, ...]] = {}
        for i, entry in enumerate(self.sites):
            for name in ("neurons", "scores", "clusters"):
                shapes[f"{i}.{name}"] = (entry.n_neurons,)
            if entry.n_profiles is not None:
                shapes[f"{i}.profiles"] = (entry.n_neurons, entry.n_profiles)
        return shapes
