"""One way to call any model, and what a model says of itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from nest.errors import LayoutError


def run_model(
    model: nn.Module,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Int[Tensor, "B T"] | None = None,
    **kwargs: Any,
) -> Any:
    """Call a model with those of the arguments that its `forward` takes.

    A custom module whose `forward` has no `input_ids` gets them as its first argument, and no mask;
    padding on the right is then harmless to a causal model.
    """
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    named = {**kwargs} if attention_mask is None else {"attention_mask": attention_mask, **kwargs}
    if "input_ids" in parameters or takes_any:
        accepted = {name: v for name, v in named.items() if takes_any or name in parameters}
        return model(input_ids=input_ids, **accepted)
    return model(input_ids, **{name: v for name, v in named.items() if name in parameters})


def logits_of(output: Any) -> Float[Tensor, "B T V"]:
    """The logits in what a model returns: `.logits`, an entry, a first element, the tensor.

    Raises:
        LayoutError: none of these.
    """
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim != 3:
        raise LayoutError(
            f"the model returned {type(output).__name__}; expected logits (B, T, V), as a tensor "
            "or as an output with .logits"
        )
    return output


def n_embeddings(model: nn.Module | None) -> int | None:
    """How many tokens a model has input embeddings for; None where it does not say."""
    named = getattr(model, "get_input_embeddings", None)
    if not callable(named):
        return None
    try:
        table = named()
    except NotImplementedError:  # transformers' word for models that do not name theirs
        return None
    rows = getattr(table, "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def context_tokens(model: nn.Module | None) -> int | None:
    """Tokens of a model's context; None where it does not say."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
