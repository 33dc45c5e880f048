"""A patch in a model in memory: folded in, taken out, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nest.errors import PatchError
from nest.models.fingerprint import config_hash
from nest.patches.data import PatchData
from nest.patches.explaining import explain
from nest.patches.live_rows import LiveBatch, LiveRows
from nest.patches.tensors import original_rows
from nest_kernels.neuron_adamw import updated_rows


@contextmanager
def changed_rows(patch: PatchData, model: nn.Module, *, fold: bool, back: bool) -> Iterator[None]:
    """The model's rows are changed inside the block, and after it unless `back`.

    What is checked is the rows that change, before and after, and the model's architecture.

    Args:
        patch: What changes them.
        model: In memory.
        fold: Put the patch in; else take it out.
        back: Put the rows back after the block; they are in any case where it does not end well.

    Raises:
        PatchError: the rows are not those that the patch expects, or do not come out as it recorded; the
            model is then left as it was.
    """
    live = LiveRows(model, patch.selection)
    current = live.read()
    checksums = patch.row_checksums if fold else patch.row_checksums[::-1]
    if live.checksum(current) != checksums[0] or config_hash(model) != patch.base.config_hash:
        explain(patch, model, patch.base.tensors if fold else patch.folded)
    change = _folded if fold else _original
    with live.restored(current, always=back):
        new = [
            change(patch, batch, rows) for batch, rows in zip(live.batches, current, strict=True)
        ]
        if live.checksum(new) != checksums[1]:
            raise PatchError(
                "the rows did not come out as the patch recorded them; the patch is damaged, "
                "fetch it again. The model is as it was before"
            )
        live.write(new)
        yield


def require_in(patch: PatchData, model: nn.Module) -> None:
    """Refuse a model that does not carry the patch in its rows.

    Raises:
        PatchError: it does not.
    """
    live = LiveRows(model, patch.selection)
    if live.checksum(live.read()) != patch.row_checksums[1]:
        explain(patch, model, patch.folded)


def _folded(patch: PatchData, batch: LiveBatch, rows: Tensor) -> Tensor:
    parts = [patch.selection.sites[i] for i in batch.indices]
    starts, groups = 0, {}
    for part in parts:
        if part.group not in groups:
            groups[part.group] = starts
            starts += part.n_clusters
    vectors = torch.cat([patch.vectors[group] for group in groups]).to(rows.device)
    clusters = torch.cat([part.clusters + groups[part.group] for part in parts])
    loadings = None
    if patch.loadings is not None:
        loadings = torch.cat([patch.loadings[part.site.name] for part in parts])
        loadings = loadings.to(rows.device)
    # Finite, since `make_patch` refuses others, and the checksum knows these.
    return updated_rows(rows, vectors, clusters.to(rows.device), loadings)


def _original(patch: PatchData, batch: LiveBatch, rows: Tensor) -> Tensor:
    originals = [
        original_rows(patch, patch.selection.sites[i], own.cpu())
        for i, own in zip(batch.indices, batch.split(rows), strict=True)
    ]
    return torch.cat(originals).to(rows.device)
