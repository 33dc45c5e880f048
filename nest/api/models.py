"""Models by name, and where one comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nest.models.loading import LoadedModel

ORGANISM = "organism"


def load(
    name: str | Path = ORGANISM,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model and its tokenizer, in eval mode.

    Args:
        name: A local folder, a name on the Hub, or `organism` for the embedded model.
        dtype: `auto` keeps the checkpoint's own.
        device: `auto` takes an accelerator where there is one.
        device_map: As transformers takes it; `device` then plays no part.
        revision: Of a model on the Hub.
        trust_remote_code: Run code that comes with the model.

    Returns:
        (model, tokenizer)

    Raises:
        InputError: no such model, or one that cannot be read.
    """
    from nest.models.loading import load_model

    return load_model(
        str(resolve_model(name)),
        dtype=dtype,
        device=device,
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


def stored_dtype(name: str | Path, *, revision: str | None = None) -> torch.dtype | None:
    """The dtype that a checkpoint's weights are stored in; None where they are quantised.

    Raises:
        InputError: no checkpoint there.
    """
    from nest.models.loading import checkpoint_folder
    from nest.models.loading import stored_dtype as stored

    return stored(checkpoint_folder(resolve_model(name), revision=revision))


def resolve_model(name: str | Path) -> str | Path:
    """The embedded model's folder for `organism`, and any other name as it is."""
    from nest.organism import model_folder

    is_organism = str(name) == ORGANISM and not Path(name).exists()
    return model_folder() if is_organism else name


def origin_of(model: nn.Module, tokenizer: Any = None) -> dict[str, Any]:
    """Which model and tokenizer this is, and with which package versions we run."""
    from nest.artifacts.provenance import package_versions
    from nest.models.fingerprint import tokenizer_hash
    from nest.models.loading import commit_of
    from nest.models.wrappers import unwrapped

    model = unwrapped(model)
    config = getattr(model, "config", None)
    return {
        "model": str(getattr(config, "_name_or_path", "") or type(model).__name__),
        "revision": commit_of(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokenizer_hash": None if tokenizer is None else tokenizer_hash(tokenizer),
        "versions": package_versions(),
    }
