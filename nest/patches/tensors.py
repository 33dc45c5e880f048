"""One touched weight with a patch in it, or without: what folding a checkpoint on disk needs."""

from __future__ import annotations

from torch import Tensor

from nest.errors import PatchError
from nest.models.fingerprint import dtype_name, tensor_hash
from nest.models.sites import read_rows, write_rows
from nest.patches.data import PatchData, part_updated
from nest.patches.explaining import check_state
from nest.patches.revert_bits import unpack_original_rows
from nest.selection.selection import SiteSelection


def changed_tensor(patch: PatchData, parameter: str, weight: Tensor, *, fold: bool) -> Tensor:
    """A copy of one touched weight, on the CPU, with the patch in it (`fold`) or taken out.

    Raises:
        PatchError: it is not the weight that the patch expects, or the patch is damaged.
    """
    before, after = (
        (patch.base.tensors, patch.folded) if fold else (patch.folded, patch.base.tensors)
    )
    parts = patch.parameters[parameter]
    changed = weight.detach().cpu().clone()
    check_state(patch, {parameter: tensor_hash(changed)}, before, dtype_name(weight.dtype))
    for part in parts:
        rows = read_rows(changed, part.site, part.neurons)
        new = (
            part_updated(part, rows, patch.vectors, patch.loadings)
            if fold
            else original_rows(patch, part, rows)
        )
        write_rows(changed, part.site, part.neurons, new)
    if tensor_hash(changed) != after[parameter]:
        raise PatchError(
            f"{parameter} did not come out as the patch recorded it; the patch is damaged, "
            "fetch it again"
        )
    return changed


def original_rows(patch: PatchData, part: SiteSelection, rows: Tensor) -> Tensor:
    """The rows of one site as they were before the patch, bit by bit.

    Raises:
        PatchError: the patch's revert bits are damaged.
    """
    return unpack_original_rows(rows, patch.delta_of(part), patch.revert_bits[part.site.name])
