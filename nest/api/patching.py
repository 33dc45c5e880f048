"""`nest.fold`, `nest.revert` and `nest.verify`: patches in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nest.api.models import resolve_model

if TYPE_CHECKING:
    from nest.patches.checkpoint import FoldResult
    from nest.patches.patch import NeuronPatch
    from nest.patches.verify import Verification


def fold(
    model: str | Path,
    patch: NeuronPatch | str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    overwrite: bool = False,
) -> FoldResult:
    """Write a checkpoint with the patch in its weights; all other files are carried along.

    Args:
        model: The checkpoint the patch was made for.
        patch: The patch.
        out: Folder to write.
        revision: Of a model on the Hub; the commit recorded in the patch if None.
        overwrite: Replace an older checkpoint there.

    Raises:
        PatchError: the patch is of another model, or of another dtype.
        OutputExistsError: `out` exists.
    """
    from nest.patches.checkpoint import fold_checkpoint

    return fold_checkpoint(
        resolve_model(model), load_patch(patch), Path(out), revision=revision, overwrite=overwrite
    )


def revert(
    model: str | Path,
    patch: NeuronPatch | str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    overwrite: bool = False,
) -> FoldResult:
    """Write the checkpoint as it was before the patch was folded in, bit for bit.

    Raises:
        PatchError: the checkpoint does not carry the patch.
        OutputExistsError: `out` exists.
    """
    from nest.patches.checkpoint import revert_checkpoint

    return revert_checkpoint(
        resolve_model(model), load_patch(patch), Path(out), revision=revision, overwrite=overwrite
    )


def verify(
    model: str | Path,
    patch: NeuronPatch | str | Path,
    *,
    folded: str | Path | None = None,
    device: str = "auto",
    revision: str | None = None,
) -> Verification:
    """Prove what a patch changes in a checkpoint, and that it changes nothing else.

    Args:
        model: The checkpoint without the patch.
        patch: The patch.
        folded: A folded checkpoint to compare; without one, the patch is folded in memory.
        device: Where logits are computed.
        revision: Of a model on the Hub; the commit recorded in the patch if None.
    """
    from nest.patches.verify import verify as run

    return run(
        resolve_model(model), load_patch(patch), folded=folded, device=device, revision=revision
    )


def load_patch(patch: NeuronPatch | str | Path) -> NeuronPatch:
    """A patch from its folder, or the patch itself."""
    from nest.patches.patch import NeuronPatch

    return NeuronPatch.load(patch) if isinstance(patch, (str, Path)) else patch
