"""The families of models that organisms are of: untrained, with sizes as the recipe says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from nest.errors import InputError
from nest.models.sites import NeuronSite

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sizes:
    """How large a model is, whatever its family.

    Attributes:
        d_model: Width of the residual stream.
        d_ff: Neurons a projection.
        n_layers: Blocks.
        n_heads: Attention heads.
        n_kv_heads: Heads of keys and values, that groups of query heads share; not for `gpt_neox`.
        max_tokens: Longest sequence, in tokens.
        sliding_window: How many tokens back every second block of `gemma3` attends.
    """

    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    max_tokens: int
    sliding_window: int


def make_model(family: str, sizes: Sizes, tokens: Mapping[str, Any]) -> PreTrainedModel:
    """A model of a family, its weights drawn from torch's generator as it stands.

    Args:
        family: A key of `FAMILIES`.
        sizes: How large.
        tokens: `vocab_size` and the ids of the special tokens, as every config names them.

    Raises:
        InputError: no such family.
    """
    if family not in FAMILIES:
        raise InputError(
            f"there is no family {family!r} of organisms; choose one of {', '.join(FAMILIES)}"
        )
    shape = {
        **tokens,
        "hidden_size": sizes.d_model,
        "intermediate_size": sizes.d_ff,
        "num_hidden_layers": sizes.n_layers,
        "num_attention_heads": sizes.n_heads,
        "max_position_embeddings": sizes.max_tokens,
        "tie_word_embeddings": True,
    }
    return FAMILIES[family](shape, sizes)


def layout(family: str, model: nn.Module) -> tuple[NeuronSite, ...] | None:
    """The sites of a family that `find_sites` does not find; None for all others.

    Phi-3 holds gate and up projection in one weight, the gate's rows first.
    """
    if family != "phi3":
        return None
    config: Any = model.config
    return tuple(
        NeuronSite(
            layer,
            projection,
            f"model.layers.{layer}.mlp.gate_up_proj",
            length=config.intermediate_size,
            offset=offset,
        )
        for layer in range(config.num_hidden_layers)
        for projection, offset in (("gate_proj", 0), ("up_proj", config.intermediate_size))
    )


def _llama(shape: dict[str, Any], sizes: Sizes) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=sizes.n_kv_heads))


def _gpt_neox(shape: dict[str, Any], sizes: Sizes) -> PreTrainedModel:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    # transformers turns rotary_pct into rope_parameters
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, rotary_pct=1.0))  # type: ignore[call-arg]


def _qwen3(shape: dict[str, Any], sizes: Sizes) -> PreTrainedModel:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    head_dim = sizes.d_model // sizes.n_heads
    config = Qwen3Config(**shape, num_key_value_heads=sizes.n_kv_heads, head_dim=head_dim)
    return Qwen3ForCausalLM(config)


def _phi3(shape: dict[str, Any], sizes: Sizes) -> PreTrainedModel:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**shape, num_key_value_heads=sizes.n_kv_heads))


def _gemma3(shape: dict[str, Any], sizes: Sizes) -> PreTrainedModel:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    head_dim = sizes.d_model // sizes.n_heads
    kinds = ("sliding_attention", "full_attention")
    config = Gemma3TextConfig(
        **shape,
        num_key_value_heads=sizes.n_kv_heads,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        sliding_window=sizes.sliding_window,
        # given block by block: the family's pattern of six is longer than our models are deep
        layer_types=[kinds[layer % 2] for layer in range(sizes.n_layers)],
    )
    return Gemma3ForCausalLM(config)


FAMILIES: Mapping[str, Callable[[dict[str, Any], Sizes], PreTrainedModel]] = {
    "llama": _llama,
    "gpt_neox": _gpt_neox,
    "qwen3": _qwen3,
    "phi3": _phi3,
    "gemma3": _gemma3,
}
"""Every family by name, each a function from the config's common keys and the sizes to a model."""
