"""What `select` finds: the neurons of every site, their scores and clusters, and how they were found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nest.artifacts.schema import read_entry
from nest.artifacts.storage import check_sealed, read_manifest, read_tensors, write_artifact
from nest.errors import SelectionError
from nest.models.binding import bind
from nest.models.fingerprint import ModelFingerprint, fingerprint
from nest.models.layouts import find_sites
from nest.models.sites import NeuronSite
from nest.selection.config import UpdateForm
from nest.selection.manifest import SelectionManifest
from nest.settings import in_range, range_text

FORMAT_VERSION = "1.1"
TENSORS = "selection.safetensors"
MEND = "it was not written by nest, or was edited: run `nest select` again"


@dataclass(frozen=True)
class SiteSelection:
    """The chosen neurons of one site.

    Attributes:
        site: Where they are.
        neurons: Their ids within the site, int64 (N,), ascending.
        scores: z-score of each, fp32 (N,).
        clusters: Cluster of each, int64 (N,), in [0, K).
        width: Length D of their weight vectors.
        group: Sites of one group share their clusters' vectors: the site's own name when clusters
            are found per projection, one name a layer when they are found per layer.
        n_clusters: Number of clusters K of the group.
        profiles: Pooled activation of each neuron over a sample of the probe prompts, fp32 (N, P), for
            plots and for clustering anew; None where the selection was written down by hand.
    """

    site: NeuronSite
    neurons: Int[Tensor, " N"]
    scores: Float[Tensor, " N"]
    clusters: Int[Tensor, " N"]
    width: int
    group: str
    n_clusters: int
    profiles: Float[Tensor, "N P"] | None = None

    def check(self) -> None:
        """Refuse ids and clusters that cannot be.

        Raises:
            SelectionError: ids out of range, repeated or unsorted; clusters out of range; lengths
                that differ.
        """
        where, n = self.site.name, self.neurons.numel()
        if n == 0:
            raise SelectionError(f"{where} is listed but has no neurons; leave the site out")
        if self.scores.numel() != n or self.clusters.numel() != n:
            raise SelectionError(
                f"{where} has {n} neurons, {self.scores.numel()} scores and "
                f"{self.clusters.numel()} clusters; there must be one of each a neuron"
            )
        low, high = int(self.neurons.min()), int(self.neurons.max())
        if low < 0 or high >= self.site.length:
            raise SelectionError(
                f"{where} has neurons 0 to {self.site.length - 1}, but the selection names "
                f"{low if low < 0 else high}"
            )
        if n > 1 and bool((self.neurons.diff() <= 0).any()):
            raise SelectionError(f"{where} must list its neurons in ascending order, each once")
        if int(self.clusters.min()) < 0 or int(self.clusters.max()) >= self.n_clusters:
            raise SelectionError(
                f"{where} has cluster ids {int(self.clusters.min())} to {int(self.clusters.max())}; "
                f"they must lie in 0 to {self.n_clusters - 1}"
            )
        if self.profiles is not None and self.profiles.shape[0] != n:
            raise SelectionError(f"{where} has {n} neurons but {self.profiles.shape[0]} profiles")
        finite = [self.scores] if self.profiles is None else [self.scores, self.profiles]
        if not all(bool(torch.isfinite(values).all()) for values in finite):
            raise SelectionError(f"{where} has a score or profile that is not a finite number")


@dataclass(frozen=True, repr=False)
class NeuronSelection:
    """The chosen neurons of a model.

    Attributes:
        sites: One entry for each site that has neurons.
        base: Fingerprint of the model they were found in.
        provenance: How they were found: resolved config, prompt hashes, probe accuracies, silhouettes,
            package versions, skipped sites.
    """

    sites: tuple[SiteSelection, ...]
    base: ModelFingerprint
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"NeuronSelection({self.n_neurons} neurons in {self.n_clusters} clusters at "
            f"{len(self.sites)} sites)"
        )

    def __post_init__(self) -> None:
        if not self.sites:
            raise SelectionError("a selection needs at least one site with neurons")
        names = [part.site.name for part in self.sites]
        if len(set(names)) != len(names):
            raise SelectionError(f"a site is listed twice: {sorted(names)}")
        shapes: dict[str, tuple[int, int]] = {}
        for part in self.sites:
            part.check()
            shape = shapes.setdefault(part.group, (part.n_clusters, part.width))
            if shape != (part.n_clusters, part.width):
                raise SelectionError(
                    f"the sites of group {part.group} disagree about clusters and width: "
                    f"{shape} and {(part.n_clusters, part.width)}"
                )

    @property
    def groups(self) -> dict[str, tuple[int, int]]:
        """For each group of sites the shape (K, D) of its vectors, in the order of the sites."""
        return {part.group: (part.n_clusters, part.width) for part in self.sites}

    @property
    def n_neurons(self) -> int:
        """Number of chosen neurons over all sites."""
        return sum(part.neurons.numel() for part in self.sites)

    @property
    def n_clusters(self) -> int:
        """Number of clusters over all groups."""
        return sum(n_clusters for n_clusters, _ in self.groups.values())

    def trainable_parameters(self, update: UpdateForm = "shared") -> int:
        """Numbers that training changes: K x D a group, and with `loaded` one more a neuron."""
        vectors = sum(n_clusters * width for n_clusters, width in self.groups.values())
        return vectors + (self.n_neurons if update == "loaded" else 0)

    @staticmethod
    def of(
        model: nn.Module,
        chosen: Mapping[str, tuple[Sequence[int], Sequence[int]]],
        *,
        layout: Sequence[NeuronSite] | None = None,
    ) -> NeuronSelection:
        """A selection written down by hand.

        Args:
            model: The model it is for.
            chosen: For each module path the neuron ids, and the cluster of each.
            layout: The model's sites, where they cannot be found from its modules.

        Raises:
            SelectionError: a path that is no site, or ids that cannot be.
        """
        sites = {site.name: site for site in find_sites(model, layout)}
        parts = []
        for name, (neurons, clusters) in chosen.items():
            if name not in sites:
                raise SelectionError(f"{name} is no site of this model; it has {', '.join(sites)}")
            if len(neurons) != len(clusters):
                raise SelectionError(
                    f"{name} has {len(neurons)} neurons but {len(clusters)} clusters"
                )
            ids, order = torch.tensor(list(neurons), dtype=torch.int64).sort()
            labels = torch.tensor(list(clusters), dtype=torch.int64)[order]
            parts.append(
                SiteSelection(
                    site=sites[name],
                    neurons=ids,
                    scores=torch.zeros(len(neurons)),
                    clusters=labels,
                    width=bind(model, sites[name]).width,
                    group=name,
                    n_clusters=int(labels.max()) + 1 if labels.numel() else 0,
                )
            )
        parts.sort(key=lambda part: part.site)
        touched = [part.site for part in parts]
        return NeuronSelection(tuple(parts), fingerprint(model, touched), {"how": "by hand"})

    def in_layers(self, first: int, end: int | None = None) -> NeuronSelection:
        """The part of the selection that lies in layers `first` to `end` - 1, or to the last.

        Raises:
            SelectionError: there is none.
        """
        kept = tuple(part for part in self.sites if in_range(part.site.layer, (first, end)))
        if not kept:
            layers = sorted({part.site.layer for part in self.sites})
            raise SelectionError(
                f"the selection has no neurons in layers {range_text((first, end))}; it has some in "
                f"{', '.join(map(str, layers))}"
            )
        return replace(self, sites=kept)

    def separated(self) -> NeuronSelection:
        """The same neurons, each a cluster of its own: in the shared form a trainable row a neuron."""
        parts = tuple(
            replace(
                part,
                clusters=torch.arange(part.neurons.numel()),
                group=part.site.name,
                n_clusters=part.neurons.numel(),
            )
            for part in self.sites
        )
        return replace(
            self, sites=parts, provenance={**self.provenance, "clusters": "one a neuron"}
        )

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write `manifest.json` and `selection.safetensors` into a new folder.

        Raises:
            OutputExistsError: the folder is there and `overwrite` was not asked for.
        """
        write_artifact(
            Path(folder),
            kind="selection",
            manifest=self.manifest(),
            tensors={TENSORS: self.tensors()},
            overwrite=overwrite,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names that `tensor_shapes` gives them (a patch carries them too)."""
        tensors: dict[str, Tensor] = {}
        for i, part in enumerate(self.sites):
            tensors[f"{i}.neurons"] = part.neurons
            tensors[f"{i}.scores"] = part.scores
            tensors[f"{i}.clusters"] = part.clusters
            if part.profiles is not None:
                tensors[f"{i}.profiles"] = part.profiles.float()
        return tensors

    def sha256(self) -> str:
        """Hash of the neurons and clusters alone, and of where they are."""
        digest = hashlib.sha256()
        for part in self.sites:
            where = [part.site.to_dict(), part.width, part.group, part.n_clusters]
            digest.update(
                json.dumps([*where, part.neurons.tolist(), part.clusters.tolist()]).encode()
            )
        return digest.hexdigest()

    def manifest(self) -> dict[str, Any]:
        """The plain part: sites, counts, base and provenance; the tensors are saved beside it."""
        return {
            "format_version": FORMAT_VERSION,
            "base": self.base.to_dict(),
            "counts": {
                "sites": len(self.sites),
                "neurons": self.n_neurons,
                "clusters": self.n_clusters,
            },
            "sites": [
                {
                    **part.site.to_dict(),
                    "n_neurons": part.neurons.numel(),
                    "width": part.width,
                    "group": part.group,
                    "n_clusters": part.n_clusters,
                    "n_profiles": None if part.profiles is None else part.profiles.shape[1],
                }
                for part in self.sites
            ],
            "provenance": dict(self.provenance),
        }

    @staticmethod
    def load(folder: str | Path) -> NeuronSelection:
        """Read what `save` wrote, refusing whatever does not add up.

        Raises:
            MissingInputError: no such folder or file.
            SelectionError: damaged, of an unknown version, or inconsistent.
        """
        values = read_manifest(Path(folder), kind="selection")
        manifest = read_entry(SelectionManifest, values, SelectionError, MEND)
        expected = manifest.tensor_shapes()
        tensors = read_tensors(Path(folder) / TENSORS, expected, kind="selection")
        selection = NeuronSelection.from_manifest(manifest, tensors)
        check_sealed(folder, values, TENSORS, kind="selection")
        return selection

    @staticmethod
    def from_manifest(
        manifest: SelectionManifest, tensors: Mapping[str, Tensor]
    ) -> NeuronSelection:
        """Put a selection together from its manifest and tensors (a patch carries them too).

        Raises:
            SelectionError: they do not fit together.
        """
        parts = tuple(
            SiteSelection(
                site=entry.site(),
                neurons=tensors[f"{i}.neurons"].to(torch.int64),
                scores=tensors[f"{i}.scores"].float(),
                clusters=tensors[f"{i}.clusters"].to(torch.int64),
                width=entry.width,
                group=entry.group,
                n_clusters=entry.n_clusters,
                profiles=tensors.get(f"{i}.profiles"),
            )
            for i, entry in enumerate(manifest.sites)
        )
        return NeuronSelection(parts, manifest.base.fingerprint(), dict(manifest.provenance))
