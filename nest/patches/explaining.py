"""Why a model's weights are not those that a patch expects, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from torch import nn

from nest.errors import PatchError
from nest.models.fingerprint import config_hash, dtype_name, tensor_hash
from nest.patches.data import PatchData
from nest.patches.live_rows import touched_weights


def explain(patch: PatchData, model: nn.Module, state: Mapping[str, str]) -> NoReturn:
    """Say why a model's rows are not those of a state, which is `patch.base.tensors` or `patch.folded`.

    Raises:
        PatchError: always.
    """
    weights = touched_weights(model, patch.selection)
    dtypes = ",".join(sorted({dtype_name(weight.dtype) for weight in weights.values()}))
    found = {name: tensor_hash(weight) for name, weight in weights.items()}
    check_state(patch, found, state, dtypes)
    if config_hash(model) != patch.base.config_hash:
        raise PatchError(
            "the touched weights are the patch's, but the rest of the model has another shape "
            "(its config differs); use the model the patch was made for"
        )
    raise PatchError(
        "the touched weights are the patch's, but its checksums of their rows are not; the patch is "
        "damaged, fetch it again"
    )


def check_state(
    patch: PatchData, found: Mapping[str, str], state: Mapping[str, str], dtypes: str
) -> None:
    """Refuse weights that are not those of a state.

    Args:
        patch: Whose states these are.
        found: Hash of each weight, by parameter.
        state: What they should be: `patch.base.tensors` or `patch.folded`.
        dtypes: Of the weights, joined by commas.

    Raises:
        PatchError: another dtype, the other state, or another model; says which.
    """
    wrong = [name for name, value in found.items() if value != state[name]]
    if not wrong:
        return
    if dtypes not in (patch.base.dtype, *patch.base.dtype.split(",")):
        raise PatchError(
            f"the model's weights are {dtypes}, but the patch was made for {patch.base.dtype} "
            f"and is exact only there; load the model with dtype {patch.base.dtype}"
        )
    other = patch.folded if state is patch.base.tensors else patch.base.tensors
    if all(value == other[name] for name, value in found.items()):
        carries = state is patch.base.tensors
        raise PatchError(
            "the model carries this patch already; revert it first, or go on without it"
            if carries
            else "the model does not carry this patch: its weights are those from before it"
        )
    raise PatchError(
        f"the patch is of another model: {len(wrong)} of {len(found)} weights it changes "
        f"differ, the first being {wrong[0]}; use the very checkpoint it was made for"
    )
