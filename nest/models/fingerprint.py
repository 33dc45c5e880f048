"""What a selection or a patch remembers of its model, to recognise it again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nest.artifacts.schema import Entry, Sha256
from nest.models.binding import bind_all
from nest.models.sites import NeuronSite
from nest.models.wrappers import named_buffers, named_parameters, unwrapped

CONFIG_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
"""What of a transformers config is hashed: the architecture, in words that every version writes."""


@dataclass(frozen=True)
class ModelFingerprint:
    """Hashes that tell one model from another.

    Attributes:
        config_hash: sha256 of the architecture: `CONFIG_KEYS` of a transformers config, or the
            names and shapes of all parameters where there is none.
        tensors: For each touched parameter the sha256 of its bytes.
        dtype: Of the touched parameters, such as `bfloat16`; several are joined by commas.
    """

    config_hash: str
    tensors: Mapping[str, str]
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return {**asdict(self), "tensors": dict(self.tensors)}


class FingerprintEntry(Entry):
    """A fingerprint as a manifest has it."""

    config_hash: str
    tensors: dict[str, Sha256]
    dtype: str

    def fingerprint(self) -> ModelFingerprint:
        """What it says."""
        return ModelFingerprint(self.config_hash, self.tensors, self.dtype)


def fingerprint(model: nn.Module, sites: Sequence[NeuronSite]) -> ModelFingerprint:
    """Fingerprint of a model as it is now, with the tensors that these sites touch.

    Raises:
        LayoutError: the model does not have one of the sites.
    """
    weights = {bound.site.parameter: bound.weight for bound in bind_all(model, sites)}
    dtypes = sorted({dtype_name(weight.dtype) for weight in weights.values()})
    hashes = {name: tensor_hash(weight) for name, weight in weights.items()}
    return ModelFingerprint(config_hash(model), hashes, ",".join(dtypes))


def tensor_hash(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes, rows first: the same on every device and on disk."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def weights_hash(model: nn.Module) -> str:
    """sha256 over all parameters and buffers of a model, by name.

    Some threads hash at once: one core takes about a second for a gigabyte.
    """
    from concurrent.futures import ThreadPoolExecutor

    named = sorted([*named_parameters(model), *named_buffers(model)], key=lambda pair: pair[0])
    names = [name for name, _ in named]
    readable = [value for _, value in named if value.device.type != "meta"]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return _json_hash([names, list(pool.map(tensor_hash, readable))])


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order; a copy only where it has to be."""
    plain = tensor.detach().cpu().contiguous()
    return plain.flatten().view(torch.uint8).numpy().data


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def config_hash(model: nn.Module) -> str:
    """sha256 of a model's architecture; its weights and its name play no part."""
    config = getattr(unwrapped(model), "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        text = config.get_text_config()
        described: Any = {key: getattr(text, key, None) for key in CONFIG_KEYS}
    else:
        described = [[name, list(value.shape)] for name, value in named_parameters(model)]
    return _json_hash(described)


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of a tokenizer's vocabulary and chat template."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return _json_hash([vocabulary, getattr(tokenizer, "chat_template", None)])


def _json_hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
