"""Load a transformers checkpoint: safetensors only, every weight accounted for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
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

_STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""safetensors' names of the dtypes that a model can be run in."""

STALE_WEIGHTS = (
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "*.gguf",
    "*.onnx",
    "consolidated*.safetensors",
    "consolidated*.pth",
    "model.*.safetensors",
)
"""The same weights in other formats or precisions: neither fetched nor carried along."""

_LFS_POINTER = b"version https://git-lfs"


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
        dtype: `auto` (that of the checkpoint's files, whatever its config says), a name in `DTYPES`, or
            a torch dtype.
        device: `auto` (a GPU if there is one), or any torch device; `auto` beside a `device_map`.
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
            str(name),
            revision=commit_of(model) or revision or "main",
            trust_remote_code=trust_remote_code,
        )
    # Whatever is in the files: tokenizers raises plain Exception at what a newer version wrote.
    except Exception as fault:
        raise InputError(
            f"{name} has no tokenizer that could be loaded: {_first_line(fault)}; put the tokenizer's "
            "files beside config.json, and update transformers and tokenizers if they are older than it"
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
    if device_map is not None and device != "auto":
        raise InputError(
            f"device {str(device)!r} and device_map {device_map!r} were both given; give one of them"
        )
    target = None if device_map is not None else resolve_device(device)
    if is_local(name):
        name = Path(name).expanduser()
    folder = checkpoint_folder(name, revision=revision)
    commit = None if is_local(name) else folder.name
    if torch_dtype == "auto":
        torch_dtype = stored_dtype(folder) or "auto"
    from transformers import AutoModelForCausalLM

    with _quiet():
        try:
            found: Any = AutoModelForCausalLM.from_pretrained(
                str(name),
                dtype=torch_dtype,
                device_map=device_map,
                revision=commit or "main",
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
        # Whatever is in its config: wrong types there are any kind of exception, from any depth.
        except Exception as fault:
            raise InputError(
                f"{name} could not be loaded as a model: {_first_line(fault)}"
            ) from fault
    model, info = found  # transformers' types do not know output_loading_info
    _check_complete(name, info)
    if commit is not None:
        # transformers' own name for it, which transformers 5 no longer fills in
        model.config._commit_hash = commit
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


def commit_of(model: nn.Module) -> str | None:
    """The commit on the Hub that a model was loaded from; None for a local folder."""
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    return commit if isinstance(commit, str) else None


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype that most numbers of a checkpoint are stored in; None where it is quantised."""
    counts: Counter[str] = Counter()
    for file in sorted(set(check_checkpoint(folder).values())):
        for dtype, size in _sizes(file):
            counts[dtype] += size
    most = max(counts, key=lambda dtype: counts[dtype], default="")
    return None if _config_of(folder).get("quantization_config") else _STORED.get(most)


def check_checkpoint(folder: Path) -> dict[str, Path]:
    """Check that a folder is a complete safetensors checkpoint, reading its headers only.

    Returns:
        For each tensor's key the file that holds it.

    Raises:
        MissingInputError: no such folder, or a shard is missing.
        InputError: not a checkpoint, without safetensors, with a damaged file, or with more than one set
            of weights, of which transformers and other tools would take different ones.
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
    explicit = _config_of(folder).get("transformers_weights")
    if explicit is not None:
        raise InputError(
            f"{folder}/config.json names its weights itself (transformers_weights {str(explicit)[:60]!r}); "
            "save the model with save_pretrained first"
        )
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder} holds an adapter (adapter_config.json) beside the weights, which transformers would "
            "put on top of them; move the adapter's files elsewhere, or merge it and save the model whole"
        )
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file() and single.is_file():
        raise InputError(
            f"{folder} holds two sets of weights, {single.name} and the shards that {index.name} names: "
            "transformers takes the first and other tools the second; delete the one that is not meant"
        )
    if not index.is_file():
        if not single.is_file():
            raise InputError(
                f"{folder} has no model.safetensors and no index of shards; other weight formats "
                "are not read: save the model with save_pretrained first"
            )
        return dict.fromkeys(_tensor_keys(single), single)
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
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
    holders = Counter(key for keys in present.values() for key in keys)
    twice = next((key for key, n in holders.items() if n > 1), None)
    if twice is not None:
        raise InputError(
            f"{twice} is in several shards of {folder}, and tools differ in which they take; save the "
            "model again with save_pretrained"
        )
    return files


def _config_of(folder: Path) -> Mapping[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError) as fault:
        raise InputError(f"{file} is damaged ({_first_line(fault)}); fetch it again") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} holds a {type(config).__name__}; expected a JSON object")
    return config


def checkpoint_folder(name: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a checkpoint, fetched from the Hub where the name is a Hub name.

    A fetched folder's own name is the commit.

    Args:
        name: A folder or a Hub name.
        revision: Branch, tag or commit of a Hub name.

    Raises:
        MissingInputError: no such folder.
        InputError: not a complete safetensors checkpoint, the Hub does not have it, or a revision of a
            folder.
    """
    folder = Path(name).expanduser()
    if is_local(name):
        if revision is not None:
            raise InputError(
                f"revision {revision!r} was asked for, but {name} is a folder and has none; leave out "
                "--revision, or give a Hub name like owner/name"
            )
    else:
        from huggingface_hub import snapshot_download

        try:
            # Subfolders hold other formats, checkpoints of the training, demos; no model needs them.
            fetched = snapshot_download(
                str(name), revision=revision, ignore_patterns=["*/*", *STALE_WEIGHTS]
            )
            folder = Path(fetched)
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
        if _starts_with(file, _LFS_POINTER):
            raise InputError(
                f"{file} is a git-lfs pointer and not the weights themselves; fetch them with git lfs pull"
            ) from None
        raise InputError(
            f"{file} is damaged or cut short ({_first_line(fault)}); fetch or save it again"
        ) from None


def _starts_with(file: Path, beginning: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(beginning)) == beginning


def _sizes(file: Path) -> Iterator[tuple[str, int]]:
    """(safetensors' name of the dtype, number of entries) of each tensor in a checked file."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as reader:
        for key in reader.keys():  # noqa: SIM118 - it is no mapping
            entry = reader.get_slice(key)
            yield str(entry.get_dtype()), torch.Size(entry.get_shape()).numel()


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


def resolve_device(device: str | torch.device) -> torch.device:
    """A device by its name; `auto` is the first GPU where there is one.

    Raises:
        InputError: no such device.
    """
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
