"""What a patch's manifest says."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from nest.artifacts.schema import Entry, Sha256
from nest.models.fingerprint import FingerprintEntry
from nest.selection.manifest import SelectionManifest


class PatchManifest(Entry):
    """All but the tensors."""

    format_version: str
    update: Literal["shared", "loaded"]
    base: FingerprintEntry
    folded: dict[str, Sha256]
    row_checksums: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**64)]], Field(min_length=2, max_length=2)
    ]
    selection: SelectionManifest
    provenance: dict[str, Any]
    counts: dict[str, int] = Field(default_factory=dict)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that it announces; -1 is any length."""
        shapes = self.selection.tensor_shapes()
        groups: dict[str, tuple[int, int]] = {}
        for i, entry in enumerate(self.selection.sites):
            shapes[f"{i}.revert"] = (-1,)
            if self.update == "loaded":
                shapes[f"{i}.loadings"] = (entry.n_neurons,)
            groups.setdefault(entry.group, (entry.n_clusters, entry.width))
        for j, shape in enumerate(groups.values()):
            shapes[f"{j}.vectors"] = shape
        return shapes
