"""Tiny random-weight models of many families, built in-process."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

D, F, LAYERS = 16, 24, 2

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 1}

CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED),
    "qwen2": lambda: transformers.Qwen2Config(**_GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**_GROUPED, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**_GROUPED, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_GROUPED, head_dim=8),
    "olmo2": lambda: transformers.Olmo2Config(**_GROUPED),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SIZES),
    "phi": lambda: transformers.PhiConfig(**_SIZES),
    "opt": lambda: transformers.OPTConfig(
        **{k: v for k, v in _SIZES.items() if k != "intermediate_size"},
        ffn_dim=F,
        word_embed_proj_dim=D,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=64,
        n_embd=D,
        n_layer=LAYERS,
        n_head=2,
        n_positions=64,
        n_inner=F,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "phi3": lambda: transformers.Phi3Config(**_GROUPED),
    "mixtral": lambda: transformers.MixtralConfig(**_GROUPED, num_local_experts=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_GROUPED, moe_intermediate_size=8, num_experts=2, num_experts_per_tok=1
    ),
}
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo2")
PLAIN = ("gpt_neox", "phi", "opt")


def build(family: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]())
    return model.eval()
