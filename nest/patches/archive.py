"""A patch as a folder: what is written into it, and how it is read without trust."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nest.artifacts.schema import read_entry
from nest.artifacts.storage import check_sealed, read_manifest, read_tensors, write_artifact
from nest.errors import LayoutError, PatchError, SelectionError
from nest.patches.card import model_card
from nest.patches.data import PatchData
from nest.patches.manifest import PatchManifest
from nest.selection.selection import NeuronSelection

FORMAT_VERSION = "1.2"
TENSORS = "patch.safetensors"

_DTYPES = {
    "neurons": torch.int64,
    "clusters": torch.int64,
    "scores": torch.float32,
    "vectors": torch.float32,
    "loadings": torch.float32,
    "revert": torch.uint8,
}
"""Dtype of every tensor by the last part of its name."""


def write_patch(
    patch: PatchData, folder: str | Path, *, overwrite: bool, evidence: Mapping[str, str | bytes]
) -> None:
    """Write a patch as a folder, all or nothing; see `NeuronPatch.save`."""
    tensors = patch.selection.tensors()
    for i, part in enumerate(patch.selection.sites):
        if patch.loadings is not None:
            tensors[f"{i}.loadings"] = patch.loadings[part.site.name]
        bits = bytearray(patch.revert_bits[part.site.name])
        tensors[f"{i}.revert"] = torch.frombuffer(bits, dtype=torch.uint8)
    for j, group in enumerate(patch.selection.groups):
        tensors[f"{j}.vectors"] = patch.vectors[group]
    manifest = _manifest(patch)
    write_artifact(
        folder,
        kind="patch",
        manifest=manifest,
        tensors={TENSORS: tensors},
        files={
            "README.md": model_card(manifest),
            **{f"evidence/{name}": content for name, content in evidence.items()},
        },
        overwrite=overwrite,
    )


def _manifest(patch: PatchData) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "update": patch.update,
        "base": patch.base.to_dict(),
        "folded": dict(patch.folded),
        "row_checksums": list(patch.row_checksums),
        "counts": {
            "sites": len(patch.selection.sites),
            "rows": patch.n_rows,
            "clusters": patch.selection.n_clusters,
            "trainable_parameters": patch.trainable_parameters,
        },
        "selection": patch.selection.manifest(),
        "provenance": dict(patch.provenance),
    }


def read_patch(folder: str | Path) -> dict[str, Any]:
    """The fields of a `NeuronPatch`, read from a folder and checked; see `NeuronPatch.load`."""
    values = read_manifest(folder, kind="patch")
    if "row_checksums" not in values and "folded" in values:
        raise PatchError(
            f"{folder} was written by a nest before 1.1 of the format, without checksums of its rows; "
            "tune again, or fold it with that nest"
        )
    try:
        manifest = read_entry(PatchManifest, values, PatchError, "fetch the patch again")
        tensors = read_tensors(Path(folder) / TENSORS, manifest.tensor_shapes(), kind="patch")
        _check_dtypes(tensors)
        selection = NeuronSelection.from_manifest(manifest.selection, tensors)
        check_sealed(folder, values, TENSORS, kind="patch")
    except (SelectionError, LayoutError) as fault:
        raise PatchError(f"{folder}: {fault}; fetch the patch again") from None
    names = [part.site.name for part in selection.sites]
    before, after = manifest.row_checksums
    return {
        "selection": selection,
        "vectors": {group: tensors[f"{j}.vectors"] for j, group in enumerate(selection.groups)},
        "loadings": {name: tensors[f"{i}.loadings"] for i, name in enumerate(names)}
        if manifest.update == "loaded"
        else None,
        "base": manifest.base.fingerprint(),
        "folded": dict(manifest.folded),
        "revert_bits": {n: tensors[f"{i}.revert"].numpy().tobytes() for i, n in enumerate(names)},
        "row_checksums": (before, after),
        "provenance": dict(manifest.provenance),
    }


def _check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        wanted = _DTYPES.get(name.rpartition(".")[2])
        if wanted is not None and tensor.dtype != wanted:
            raise PatchError(
                f"{TENSORS}: tensor {name!r} is {tensor.dtype}; expected {wanted}; fetch it again"
            )
