"""A patch from a trained update: what the rows were, what they become, and the bits between."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nest.artifacts.provenance import package_versions
from nest.errors import PatchError
from nest.models.binding import bind
from nest.models.fingerprint import ModelFingerprint, dtype_name, tensor_hash
from nest.models.sites import read_rows, write_rows
from nest.patches.data import PatchData, by_parameter, check_update, part_delta, part_updated
from nest.patches.live_rows import checksum
from nest.patches.revert_bits import pack_revert_bits
from nest.selection.selection import NeuronSelection, SiteSelection


def make_patch(
    model: nn.Module,
    selection: NeuronSelection,
    vectors: Mapping[str, Tensor],
    loadings: Mapping[str, Tensor] | None = None,
    *,
    originals: Mapping[str, Tensor] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> PatchData:
    """A patch of a trained update; the model is only read. See `NeuronPatch.create`."""
    parts = tuple(replace(part, profiles=None) for part in selection.sites)
    vectors = {name: _plain(values) for name, values in vectors.items()}
    plain = None if loadings is None else {k: _plain(v) for k, v in loadings.items()}
    check_update(selection, vectors, plain)
    base, folded, bits = {}, {}, {}
    dtypes = set()
    places = places_of(parts)
    before = after = 0
    for parameter, touched in by_parameter(parts).items():
        weight = bind(model, touched[0].site).weight.detach().cpu().clone()
        dtypes.add(dtype_name(weight.dtype))
        for part in touched if originals is not None else ():
            assert originals is not None
            write_rows(weight, part.site, part.neurons, originals[part.site.name].cpu())
        base[parameter] = tensor_hash(weight)
        if base[parameter] != selection.base.tensors.get(parameter):
            raise PatchError(
                f"{parameter} is not the weight that the selection was made on; select the "
                "neurons anew in this model"
            )
        for part in touched:
            name = part.site.name
            delta = part_delta(part, vectors, plain)
            rows = read_rows(weight, part.site, part.neurons)
            new = part_updated(part, rows, vectors, plain)
            bits[name] = pack_revert_bits(rows, new, delta)
            before += checksum(rows, places[name])
            after += checksum(new, places[name])
            write_rows(weight, part.site, part.neurons, new)
        folded[parameter] = tensor_hash(weight)
    return PatchData(
        selection=NeuronSelection(parts, selection.base, selection.provenance),
        vectors=vectors,
        loadings=plain,
        base=ModelFingerprint(selection.base.config_hash, base, ",".join(sorted(dtypes))),
        folded=folded,
        revert_bits=bits,
        row_checksums=(before % 2**64, after % 2**64),
        provenance={"versions": package_versions(), **(provenance or {})},
    )


def places_of(parts: Sequence[SiteSelection]) -> dict[str, Tensor]:
    """For each site where its rows stand among all rows of the selection."""
    ends = list(itertools.accumulate(len(part.neurons) for part in parts))
    return {
        part.site.name: torch.arange(end - len(part.neurons), end)
        for part, end in zip(parts, ends, strict=True)
    }


def _plain(values: Tensor) -> Tensor:
    return values.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
