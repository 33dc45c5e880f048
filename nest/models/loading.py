"""Load a transformers checkpoint: safetensors only, every weight accounted for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from nest.errors import InputError, MissingInputError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
"""Names accepted beside `auto` (the checkpoint's own)."""


class LoadedModel(NamedTuple):
    """A model in evaluation mode, and its tokenizer."""

    model: nn.Module
    tokenizer: Any


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        name: A local folder, or a Hub name. What looks like a path is never looked up on the Hub.
        dtype: `auto` (the checkpoint's own), a name in `DTYPES`, or a torch dtype.
        device: `auto` (a GPU if there is one), or any torch device. Not used with `device_map`.
        device_map: Passed to transformers, for models spread over several devices.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run code that comes with the checkpoint.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        MissingInputError: no such folder.
        InputError: no checkpoint there, a damaged one, weights missing from it, or an unknown
            option.
    """
    model = load_weights(
        name,
        dtype=dtype,
        device=device,
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    from transformers import AutoTokenizer

    if is_local(name):
        name = Path(name).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(name), revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as fault:
        raise InputError(
            f"{name} has no tokenizer that could be loaded: {_first_line(fault)}; put the "
            "tokenizer's files beside config.json"
        ) from fault
    return LoadedModel(model, tokenizer)


def load_weights(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a model without its tokenizer; arguments and errors as `load_model`."""
    torch_dtype = _resolve_dtype(dtype)
    target = None if device_map is not None else _resolve_device(device)
    if is_local(name):
        name = Path(name).expanduser()
        check_checkpoint(name)
    from transformers import AutoModelForCausalLM

    with _quiet():
        try:
            found: Any = AutoModelForCausalLM.from_pretrained(
                str(name),
                dtype=torch_dtype,
                device_map=device_map,
                revision=revision or "main",
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as fault:
            raise InputError(
                f"{name} could not be loaded as a model: {_first_line(fault)}"
            ) from fault
    model, info = found  # transformers' types do not know output_loading_info
    _check_complete(name, info)
    loaded: nn.Module = model if target is None else model.to(target)
    return loaded.eval()


def is_local(name: str | Path) -> bool:
    """Whether a name is a folder's: only `owner/name` without a local `owner` is a Hub name."""
    text = str(name)
    if isinstance(name, Path) or Path(text).expanduser().exists():
        return True
    owner, _, rest = text.partition("/")
    looks_like_hub = bool(owner and rest) and "/" not in rest and "\\" not in text
    return not looks_like_hub or owner in (".", "..", "~") or Path(owner).exists()


def check_checkpoint(folder: Path) -> dict[str, Path]:
    """Check that a folder is a complete safetensors checkpoint, reading its headers only.

    Returns:
        For each tensor's key the file that holds it.

    Raises:
        MissingInputError: no such folder, or a shard is missing.
        InputError: not a checkpoint, without safetensors, or with a damaged file.
    """
    if not folder.exists():
        raise MissingInputError(
            f"there is no folder {folder}; expected a checkpoint's folder, or "
            "a Hub name like owner/name"
        )
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is not a transformers checkpoint: expected a folder with config.json in it"
        )
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise InputError(
                f"{folder} has no model.safetensors and no index of shards; other weight formats "
                "are not read: save the model with save_pretrained first"
            )
        return dict.fromkeys(_tensor_keys(single), single)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(key): folder / Path(str(shard)).name for key, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise InputError(f"{index} is damaged ({_first_line(fault)}); fetch it again") from None
    present: dict[Path, set[str]] = {}
    for shard in sorted(set(files.values())):
        if not shard.is_file():
            raise MissingInputError(f"{index} names {shard.name}, which is missing; fetch it again")
        present[shard] = set(_tensor_keys(shard))
    for key, shard in files.items():
        if key not in present[shard]:
            raise InputError(f"{shard} lacks {key}, which its index names; fetch the shard again")
    return files


def checkpoint_folder(name: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a checkpoint, fetched from the Hub where the name is a Hub name.

    Raises:
        MissingInputError: no such folder.
        InputError: not a complete safetensors checkpoint, or the Hub does not have it.
    """
    folder = Path(name).expanduser()
    if not is_local(name):
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(name), revision=revision))
        except (OSError, ValueError) as fault:
            raise InputError(f"{name} could not be fetched: {_first_line(fault)}") from fault
    check_checkpoint(folder)
    return folder


def _tensor_keys(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as reader:
            return list(reader.keys())
    except (SafetensorError, OSError) as fault:
        raise InputError(
            f"{file} is damaged or cut short ({_first_line(fault)}); fetch or save it again"
        ) from None


def _check_complete(name: str | Path, info: dict[str, Any]) -> None:
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise InputError(
            f"the checkpoint {name} lacks {len(missing)} of the model's weights, which would be "
            f"random: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; save it whole"
        )


def _resolve_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; expected auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _resolve_device(device: str | torch.device) -> torch.device:
    if isinstance(device, torch.device):
        return device
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device {device!r}; expected auto, cpu, cuda or cuda:N") from None
    n_gpus = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= n_gpus:
        raise InputError(f"device {device!r} was asked for, but torch sees {n_gpus} GPUs; use cpu")
    return resolved


def _first_line(fault: BaseException) -> str:
    lines = str(fault).strip().splitlines()
    return (lines[0] if lines else type(fault).__name__)[:300].rstrip(".:")


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading draws a bar of its own on stderr; ours is the only one."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    try:
        logging.disable_progress_bar()
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()
