"""What is in an artifact: read, described and drawn."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest.errors import MissingInputError

if TYPE_CHECKING:
    from nest.patches.patch import NeuronPatch
    from nest.selection.selection import NeuronSelection


def load_artifact(folder: Path) -> tuple[NeuronSelection, NeuronPatch | None]:
    """A selection, or a patch with its selection; the manifest says which.

    Raises:
        MissingInputError: no such folder, or no manifest in it.
        SelectionError, PatchError: damaged.
    """
    from nest.patches.patch import NeuronPatch
    from nest.selection.selection import NeuronSelection

    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise MissingInputError(
            f"{folder} has no manifest.json; name a folder that `nest select` or `nest tune` wrote"
        )
    kind = "patch" if (folder / "patch.safetensors").is_file() else ""
    with suppress(ValueError, AttributeError):  # the readers below say what is wrong with it
        kind = json.loads(manifest.read_bytes()).get("kind")
    if kind == "patch":
        patch = NeuronPatch.load(folder)
        return patch.selection, patch
    return NeuronSelection.load(folder), None


def describe(selection: NeuronSelection, patch: NeuronPatch | None) -> dict[str, Any]:
    """Counts and origin as plain values."""
    by_layer: dict[str, dict[str, int]] = {}
    for part in selection.sites:
        layer = by_layer.setdefault(str(part.site.layer), {})
        layer[part.site.projection] = layer.get(part.site.projection, 0) + part.neurons.numel()
    values: dict[str, Any] = {
        "kind": "selection" if patch is None else "patch",
        "model": (selection.provenance if patch is None else patch.provenance).get("model"),
        "sites": len(selection.sites),
        "neurons": selection.n_neurons,
        "clusters": selection.n_clusters,
        "neurons_by_layer": by_layer,
        "probe_accuracy": selection.provenance.get("probe_accuracy"),
        "silhouette": selection.provenance.get("silhouette"),
    }
    if patch is not None:
        tuning = patch.provenance.get("tuning", {})
        values |= {
            "update": patch.update,
            "trainable_parameters": patch.trainable_parameters,
            "best_step": tuning.get("best_step"),
            "best_validation_loss": tuning.get("best_validation_loss"),
        }
    return values


def write_plots(
    selection: NeuronSelection, patch: NeuronPatch | None, folder: Path, *, overwrite: bool
) -> list[Path]:
    """Neurons by layer, the cluster map and the loss curve, as far as the artifact has them."""
    from nest.reporting.html import write_report
    from nest.reporting.plots import cluster_map_svg, loss_svg, neurons_svg

    history = [] if patch is None else patch.provenance.get("tuning", {}).get("history", [])
    figures = {
        "neurons": neurons_svg(selection),
        "clusters": cluster_map_svg(selection),
        "loss": loss_svg(history),
    }
    return [
        write_report(folder / f"{name}.svg", svg, overwrite)
        for name, svg in figures.items()
        if svg is not None
    ]
