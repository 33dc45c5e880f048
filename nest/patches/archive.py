"""A patch as a folder: what is written into it, and how it is read without trust."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nest.artifacts.storage import check_sealed, read_manifest, read_tensors, write_artifact
from nest.errors import NestError, PatchError, SelectionError
from nest.models.fingerprint import ModelFingerprint, checked_hashes
from nest.patches.card import model_card
from nest.patches.data import PatchData
from nest.selection.selection import NeuronSelection, tensor_shapes

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
    manifest = read_manifest(folder, kind="patch")
    try:
        if "row_checksums" not in manifest and "folded" in manifest:
            raise PatchError(
                f"{folder} was written by a nest before 1.1 of the format, without checksums of its rows; "
                "tune again, or fold it with that nest"
            )
        chosen = _entry(manifest, "selection", dict)
        update = _entry(manifest, "update", str)
        if update not in ("shared", "loaded"):
            raise PatchError(f"{folder}: unknown update {update[:40]!r}; expected shared or loaded")
        fields: dict[str, Any] = {
            "base": ModelFingerprint.from_dict(_entry(manifest, "base", dict)),
            "folded": checked_hashes(_entry(manifest, "folded", dict), "folded"),
            "row_checksums": _checksums(_entry(manifest, "row_checksums", list)),
            "provenance": _entry(manifest, "provenance", dict),
        }
        expected = _expected_tensors(chosen, loaded=update == "loaded")
        tensors = read_tensors(Path(folder) / TENSORS, expected, kind="patch")
        _check_dtypes(tensors)
        selection = NeuronSelection.from_manifest(chosen, tensors)
        check_sealed(folder, manifest, TENSORS, kind="patch")
    except SelectionError as fault:
        raise PatchError(f"{folder}: {fault}; fetch the patch again") from None
    except (KeyError, TypeError, ValueError, OverflowError) as fault:
        if isinstance(fault, NestError):
            raise
        raise PatchError(
            f"{folder}: manifest.json lacks or garbles the entry {fault}; fetch the patch again"
        ) from None
    names = [part.site.name for part in selection.sites]
    return {
        **fields,
        "selection": selection,
        "vectors": {group: tensors[f"{j}.vectors"] for j, group in enumerate(selection.groups)},
        "loadings": {name: tensors[f"{i}.loadings"] for i, name in enumerate(names)}
        if update == "loaded"
        else None,
        "revert_bits": {n: tensors[f"{i}.revert"].numpy().tobytes() for i, n in enumerate(names)},
    }


def _entry(manifest: Mapping[str, Any], name: str, kind: type) -> Any:
    """One entry of a manifest.

    Raises:
        KeyError, TypeError: it is missing or of another type; the message is its name.
    """
    value = manifest[name]
    if not isinstance(value, kind):
        raise TypeError(f"'{name}'")
    return value


def _checksums(values: list[Any]) -> tuple[int, int]:
    if len(values) != 2 or not all(type(v) is int and 0 <= v < 2**64 for v in values):
        raise TypeError("'row_checksums'")
    before, after = values
    return before, after


def _expected_tensors(chosen: Mapping[str, Any], *, loaded: bool) -> dict[str, tuple[int, ...]]:
    expected = tensor_shapes(chosen)
    groups: dict[str, tuple[int, int]] = {}
    for i, entry in enumerate(chosen["sites"]):
        expected[f"{i}.revert"] = (-1,)
        if loaded:
            expected[f"{i}.loadings"] = expected[f"{i}.neurons"]
        groups.setdefault(str(entry["group"]), (int(entry["n_clusters"]), int(entry["width"])))
    for j, shape in enumerate(groups.values()):
        expected[f"{j}.vectors"] = shape
    return expected


def _check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        wanted = _DTYPES.get(name.rpartition(".")[2])
        if wanted is not None and tensor.dtype != wanted:
            raise PatchError(
                f"{TENSORS}: tensor {name!r} is {tensor.dtype}; expected {wanted}; fetch it again"
            )
