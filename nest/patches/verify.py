"""Proof of what a patch changed and what it did not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nest.errors import InputError
from nest.models.binding import bind
from nest.models.calls import logits_of, run_model
from nest.models.fingerprint import tensor_hash
from nest.models.loading import check_checkpoint, load_weights
from nest.models.modes import eval_mode
from nest.models.wrappers import named_buffers, named_parameters
from nest.patches.checkpoint import (
    base_folder,
    changed_keys,
    match_keys,
    same_bits,
    shard_tensors,
)
from nest.patches.patch import NeuronPatch

N_PROBES = 4
PROBE_LENGTH = 12
PROBE_SEED = 0


@dataclass(frozen=True)
class Verification:
    """What was found; by these names in `nest verify --json`.

    Attributes:
        ok: Selected rows only were changed, to the bits that the patch recorded, the logits are
            exactly equal, and there is an effect.
        rows_changed: Rows (neurons) that differ from the base model's.
        rows_outside_selection: Of those, rows that the patch does not select; 0 expected.
        tensors_changed_elsewhere: Tensors that differ though the patch does not touch them; 0
            expected.
        max_logit_difference: Largest difference of the folded model's logits from the live model's
            (without a folded checkpoint: of the model's after fold and revert from before); 0
            expected.
        has_effect: The patch changes the logits.
    """

    ok: bool
    rows_changed: int
    rows_outside_selection: int
    tensors_changed_elsewhere: int
    max_logit_difference: float
    has_effect: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def verify(
    model: nn.Module | str | Path,
    patch: NeuronPatch,
    *,
    folded: str | Path | None = None,
    probes: Sequence[Sequence[int]] | None = None,
    device: str = "auto",
    revision: str | None = None,
) -> Verification:
    """Prove that a patch changes its selected rows, and nothing else.

    Without `folded` the patch is folded into the model in memory and taken out again; the model is
    bit-identical afterwards. With it, the two checkpoints are compared tensor by tensor, and the
    folded one's logits with those of the base model tuned live; `model` must then be a folder.

    Args:
        model: The base model, or the folder of its checkpoint.
        patch: The patch.
        folded: Folder of the checkpoint that the patch was folded into.
        probes: Token ids to compare logits on; a few random sequences if None.
        device: Where models are loaded.
        revision: Of a Hub name, as for `fold_checkpoint`.

    Raises:
        PatchError: the model is not the one the patch was made for.
        InputError: a folder is no checkpoint, or `folded` was given with a model in memory.
    """
    if folded is None:
        loaded = (
            model
            if isinstance(model, nn.Module)
            else _loaded(base_folder(model, patch, revision), device)
        )
        return _verify_in_memory(loaded, patch, probes)
    if isinstance(model, nn.Module):
        raise InputError(
            "a folded checkpoint is compared with the checkpoint it was folded from; give that "
            "checkpoint's folder in place of the model in memory"
        )
    source = base_folder(model, patch, revision)
    return _verify_checkpoints(source, patch, Path(folded), probes, device)


def _verify_in_memory(
    model: nn.Module, patch: NeuronPatch, probes: Sequence[Sequence[int]] | None
) -> Verification:
    inputs = _probes(model, probes)
    before, untouched = _logits(model, inputs), _hashes(model, patch)
    base = {name: w.detach().cpu().clone() for name, w in _touched(model, patch).items()}
    with patch.applied(model):
        during = _logits(model, inputs)
        elsewhere = _n_different(untouched, _hashes(model, patch))
        changed, outside = _count_rows(base, _touched(model, patch), patch)
    after = _logits(model, inputs)
    # Putting the patch in checked the rows against its hashes already.
    return _judge(True, changed, outside, elsewhere, _difference(before, after), before, during)


def _verify_checkpoints(
    source: Path,
    patch: NeuronPatch,
    folded: Path,
    probes: Sequence[Sequence[int]] | None,
    device: str,
) -> Verification:
    sources, targets = check_checkpoint(source), check_checkpoint(folded)
    keys = match_keys(sources, patch)
    elsewhere = len(changed_keys(source, folded) - set(keys.values()))
    changed = outside = 0
    as_recorded = True
    for parameter, key in keys.items():
        if key not in targets:
            elsewhere += 1
            continue
        with shard_tensors(sources[key]) as ours, shard_tensors(targets[key]) as theirs:
            counts = _count_rows(
                {parameter: ours.get_tensor(key)}, {parameter: theirs.get_tensor(key)}, patch
            )
            as_recorded &= tensor_hash(theirs.get_tensor(key)) == patch.folded[parameter]
        changed, outside = changed + counts[0], outside + counts[1]
    model = _loaded(source, device)
    inputs = _probes(model, probes)
    before = _logits(model, inputs)
    with patch.applied(model):
        live = _logits(model, inputs)
    del model
    written = _logits(_loaded(folded, device), inputs)
    difference = _difference(live, written)
    return _judge(as_recorded, changed, outside, elsewhere, difference, before, live)


def _judge(
    as_recorded: bool,
    changed: int,
    outside: int,
    elsewhere: int,
    difference: float,
    before: Float[Tensor, "B T V"],
    live: Float[Tensor, "B T V"],
) -> Verification:
    has_effect = not same_bits(before, live)
    ok = as_recorded and outside == 0 and elsewhere == 0 and difference == 0.0 and has_effect
    return Verification(ok, changed, outside, elsewhere, difference, has_effect)


def _count_rows(
    base: Mapping[str, Tensor], changed: Mapping[str, Tensor], patch: NeuronPatch
) -> tuple[int, int]:
    """(rows that differ, those of them outside the selection), counted along the neurons' axis."""
    n_changed = n_outside = 0
    for parameter, original in base.items():
        parts = patch.parameters[parameter]
        axis = parts[0].site.axis
        differs = _rows_that_differ(original, changed[parameter].detach().cpu(), axis)
        selected = torch.zeros_like(differs)
        for part in parts:
            selected[part.neurons + part.site.offset] = True
        n_changed += int(differs.sum())
        n_outside += int((differs & ~selected).sum())
    return n_changed, n_outside


def _rows_that_differ(first: Tensor, second: Tensor, axis: int) -> Bool[Tensor, " R"]:
    if first.shape != second.shape or first.dtype != second.dtype:
        return torch.ones(first.shape[axis], dtype=torch.bool)
    rows = [t if axis == 0 else t.T for t in (first, second)]
    ours, theirs = (t.contiguous().view(torch.uint8) for t in rows)  # (R, bytes)
    return (ours != theirs).any(dim=1)


def _touched(model: nn.Module, patch: NeuronPatch) -> dict[str, Tensor]:
    return {name: bind(model, parts[0].site).weight for name, parts in patch.parameters.items()}


def _hashes(model: nn.Module, patch: NeuronPatch) -> dict[str, str]:
    """Hashes of all parameters and buffers that the patch does not touch, tied ones too."""
    tensors = [*named_parameters(model, remove_duplicate=False), *named_buffers(model)]
    return {name: tensor_hash(t) for name, t in tensors if name not in patch.parameters}


def _n_different(first: Mapping[str, str], second: Mapping[str, str]) -> int:
    return sum(first.get(name) != second.get(name) for name in set(first) | set(second))


def _loaded(name: str | Path, device: str) -> nn.Module:
    return load_weights(name, device=device)


def _probes(model: nn.Module, probes: Sequence[Sequence[int]] | None) -> list[list[int]]:
    if probes is not None:
        return [list(ids) for ids in probes]
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    n_vocabulary = embeddings[0].num_embeddings if embeddings else 2
    draw = torch.Generator().manual_seed(PROBE_SEED)
    ids: list[list[int]] = torch.randint(
        n_vocabulary, (N_PROBES, PROBE_LENGTH), generator=draw
    ).tolist()
    return ids


@torch.no_grad()
def _logits(model: nn.Module, probes: Sequence[Sequence[int]]) -> Float[Tensor, "B T V"]:
    """Logits of all probes one after the other, as one (1, all tokens, V) tensor in fp32."""
    parameter = next(model.parameters())
    parts = []
    with eval_mode(model):
        for ids in probes:
            input_ids = torch.tensor([ids], dtype=torch.int64, device=parameter.device)
            output = run_model(model, input_ids, torch.ones_like(input_ids), use_cache=False)
            parts.append(logits_of(output).float().cpu())
    return torch.cat(parts, dim=1)


def _difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())
