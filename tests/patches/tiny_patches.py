"""Tiny models and patches on them, built in-process."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from nest.models.layouts import find_sites
from nest.models.sites import NeuronSite
from nest.patches.patch import NeuronPatch
from nest.selection.selection import NeuronSelection

D, F = 16, 24
_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build(family: str = "qwen3", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    configs = {
        "qwen3": lambda: transformers.Qwen3Config(
            **_SIZES, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True
        ),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SIZES),
        "phi3": lambda: transformers.Phi3Config(**_SIZES, num_key_value_heads=1),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=64, n_embd=D, n_layer=2, n_head=2, n_positions=64, n_inner=F,
            bos_token_id=1, eos_token_id=2,
        ),
    }  # fmt: skip
    torch.manual_seed(seed)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(configs[family]())
    return model.to(dtype).eval()


def layout_of(family: str) -> list[NeuronSite] | None:
    if family == "phi3":
        path = "model.layers.{}.mlp.gate_up_proj"
        return [
            NeuronSite(i, name, path.format(i), F, offset=offset)
            for i in range(2)
            for name, offset in (("gate_proj", 0), ("up_proj", F))
        ]
    if family == "gpt2":
        return [NeuronSite(i, "c_fc", f"transformer.h.{i}.mlp.c_fc", F, axis=1) for i in range(2)]
    return None


def select(model: nn.Module, family: str = "qwen3") -> NeuronSelection:
    layout = layout_of(family)
    chosen = {site.name: ([1, 4, 7, F - 1], [0, 1, 0, 1]) for site in find_sites(model, layout)}
    return NeuronSelection.of(model, chosen, layout=layout)


def make_patch(
    model: nn.Module, family: str = "qwen3", *, loaded: bool = True, scale: float = 0.1
) -> NeuronPatch:
    selection = select(model, family)
    draw = torch.Generator().manual_seed(3)
    vectors = {g: scale * torch.randn(s, generator=draw) for g, s in selection.groups.items()}
    loadings = {p.site.name: 1 + 0.5 * torch.randn(4, generator=draw) for p in selection.sites}
    return NeuronPatch.create(model, selection, vectors, loadings if loaded else None)
