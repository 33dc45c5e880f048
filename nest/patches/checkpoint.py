"""Fold a patch into a checkpoint on disk, or take it out: shard by shard, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nest.artifacts.storage import CHECKPOINT, new_folder
from nest.errors import InputError, PatchError
from nest.models.fingerprint import dtype_name, tensor_bytes, tensor_hash
from nest.models.loading import STALE_WEIGHTS, check_checkpoint, checkpoint_folder, is_local
from nest.patches.patch import NeuronPatch

SKIPPED_FOLDERS = (".git", ".cache", "__pycache__")


@dataclass(frozen=True)
class FoldResult:
    """What a fold or revert of a checkpoint did.

    Attributes:
        out: The new checkpoint.
        tensors_changed: How many tensors differ from the source's.
        rows_changed: How many rows (neurons) were written.
        left_out: Files of the source that hold the same weights in another format and were left.
    """

    out: str
    tensors_changed: int
    rows_changed: int
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, by the keys of `nest fold --json`."""
        return {**asdict(self), "left_out": list(self.left_out)}


def fold_checkpoint(
    source: str | Path,
    patch: NeuronPatch,
    out: str | Path,
    *,
    revision: str | None = None,
    overwrite: bool = False,
) -> FoldResult:
    """Write a copy of a checkpoint with the patch in its weights.

    The touched rows' bytes are replaced inside copies of the shards; names, order, dtypes, metadata
    and every other file stay.

    Args:
        source: Folder (or Hub name) of the checkpoint the patch was made for; only read.
        patch: The patch.
        out: Folder to write.
        revision: Of a Hub name; None takes the commit that the patch was made on, if it knows one of
            that name.
        overwrite: Replace an older checkpoint there.

    Raises:
        PatchError: the checkpoint is another one, of another dtype, or carries the patch already.
        InputError: no checkpoint at `source`, a damaged one, or `out` overlaps with it.
        OutputExistsError: `out` is there and is not to be overwritten.
    """
    folder = base_folder(source, patch, revision)
    return _rewrite(folder, patch, Path(out), overwrite=overwrite, fold=True)


def revert_checkpoint(
    source: str | Path,
    patch: NeuronPatch,
    out: str | Path,
    *,
    revision: str | None = None,
    overwrite: bool = False,
) -> FoldResult:
    """Write a copy of a folded checkpoint without the patch: its shards are the original's bytes.

    Arguments and errors as `fold_checkpoint`; `source` must carry the patch, and its revision is its own.
    """
    folder = checkpoint_folder(source, revision=revision)
    return _rewrite(folder, patch, Path(out), overwrite=overwrite, fold=False)


def base_folder(name: str | Path, patch: NeuronPatch, revision: str | None = None) -> Path:
    """The checkpoint that a patch is for: of a Hub name, at the patch's own commit unless told another.

    Raises:
        InputError: see `checkpoint_folder`.
    """
    if revision is None and not is_local(name) and patch.provenance.get("model") == str(name):
        recorded = patch.provenance.get("revision")
        revision = recorded if isinstance(recorded, str) else None
    return checkpoint_folder(name, revision=revision)


def _rewrite(
    source: Path, patch: NeuronPatch, out: Path, *, overwrite: bool, fold: bool
) -> FoldResult:
    files = check_checkpoint(source)
    with new_folder(out, kind=CHECKPOINT, overwrite=overwrite, sources=[source]) as temporary:
        keys = match_keys(files, patch)
        by_shard: dict[Path, dict[str, str]] = defaultdict(dict)
        for parameter, key in keys.items():
            by_shard[files[key]][parameter] = key
        change = patch.fold_tensor if fold else patch.revert_tensor
        for shard, touched in by_shard.items():  # checks come before the first byte is written
            copy = temporary / shard.name
            shutil.copyfile(shard, copy)
            with shard_tensors(shard) as tensors:
                spans = _spans(shard)
                for parameter, key in touched.items():
                    changed = change(parameter, tensors.get_tensor(key))
                    _replace_bytes(copy, spans[key], changed)
        left_out = _carry_along(source, temporary, set(files.values()), set(by_shard))
    return FoldResult(str(out), len(keys), patch.n_rows, left_out)


def match_keys(files: Mapping[str, Path], patch: NeuronPatch) -> dict[str, str]:
    """The checkpoint's key of each parameter the patch touches.

    Names differ where the checkpoint was saved from the bare backbone, or where transformers
    renames on loading. A key that differs in its leading parts is taken only if its content is the
    patch's.

    Raises:
        PatchError: a parameter is not in the checkpoint.
    """
    keys: dict[str, str] = {}
    for parameter in patch.parameters:
        if parameter in files:
            keys[parameter] = parameter
            continue
        known = {patch.base.tensors[parameter], patch.folded[parameter]}
        renamed = [key for key in files if _same_tail(key, parameter)]
        same = [key for key in renamed if _hash_of(files[key], key) in known]
        if len(same) != 1:
            seen = f"; {renamed[0]} has other content" if renamed else ""
            raise PatchError(
                f"the patch is of another model: the checkpoint has no tensor {parameter}, nor one under "
                f"another name with its content{seen}. Use the very checkpoint the patch was made for, "
                "saved by save_pretrained where its tensors are renamed or merged on loading"
            )
        keys[parameter] = same[0]
    return keys


def _same_tail(key: str, parameter: str) -> bool:
    """Same name from the block's index on: `layers.3.mlp.fc1.weight` with any prefix."""
    return _tail(key) == _tail(parameter)


def _tail(name: str) -> str:
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[max(first - 1, 0) :])


def _hash_of(shard: Path, key: str) -> str:
    with shard_tensors(shard) as tensors:
        return tensor_hash(tensors.get_tensor(key))


@contextmanager
def shard_tensors(shard: Path) -> Iterator[Any]:
    """An open safetensors file.

    Raises:
        InputError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="pt") as reader:
            yield reader
    except SafetensorError as fault:
        raise InputError(f"{shard} is damaged ({fault}); fetch or save it again") from None


def _spans(shard: Path) -> dict[str, tuple[int, int, str]]:
    """For each tensor where its bytes begin and end in the file, and its dtype's name.

    The header's form is safetensors': its length in eight bytes, then JSON. `safe_open` has checked
    it by now.
    """
    with shard.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(n_header))
    start = 8 + n_header
    return {
        key: (start + entry["data_offsets"][0], start + entry["data_offsets"][1], entry["dtype"])
        for key, entry in header.items()
        if key != "__metadata__"
    }


def _replace_bytes(file: Path, span: tuple[int, int, str], tensor: Tensor) -> None:
    start, stop, dtype = span
    content = tensor_bytes(tensor)
    if len(content) != stop - start:
        raise PatchError(
            f"{file.name} holds {stop - start} bytes of {dtype} where the patch has "
            f"{dtype_name(tensor.dtype)} weights of {len(content)} bytes; use the checkpoint the "
            "patch was made for"
        )
    with file.open("r+b") as opened:
        opened.seek(start)
        opened.write(content)


def _carry_along(
    source: Path, target: Path, weights: set[Path], written: set[Path]
) -> tuple[str, ...]:
    """Copy what else is in the source; returns what was left out: weights that are not the model's."""
    left_out: list[str] = []
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if any(part in SKIPPED_FOLDERS for part in relative.parts) or path in written:
            continue
        stale = any(fnmatch(path.name, pattern) for pattern in STALE_WEIGHTS)
        if stale or (path.suffix == ".safetensors" and path not in weights):
            left_out.append(str(relative))
        elif path.is_file():
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)
    return tuple(left_out)


def changed_keys(source: str | Path, other: str | Path) -> set[str]:
    """Keys whose tensors differ in dtype, shape or any bit, or are in one checkpoint only."""
    first, second = check_checkpoint(Path(source)), check_checkpoint(Path(other))
    changed = set(first) ^ set(second)
    for key in sorted(set(first) & set(second)):
        with shard_tensors(first[key]) as ours, shard_tensors(second[key]) as theirs:
            if not same_bits(ours.get_tensor(key), theirs.get_tensor(key)):
                changed.add(key)
    return changed


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Same dtype, shape and bits; unlike `torch.equal`, a NaN equals itself and 0 is not -0."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(
        first.detach().cpu().contiguous().flatten().view(torch.uint8),
        second.detach().cpu().contiguous().flatten().view(torch.uint8),
    )
