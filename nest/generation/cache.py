"""Key-value caches that grow in place. Imports transformers: import it late."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

CHUNK_TOKENS = 16
"""Room in a layer's buffers beyond what it holds, whenever they are made anew."""


class GrowingLayer(DynamicLayer):
    """A layer whose keys and values lie in buffers with room for more tokens.

    transformers' own layer copies everything at every token, which took a fifth of the time of
    decoding the embedded model's answers of 15 tokens.

    Args:
        keys, values: What it holds to begin with, of one row or of all.
        n_rows: Rows of the batch; a single row is repeated.
    """

    def __init__(
        self, keys: Float[Tensor, "B H T D"], values: Float[Tensor, "B H T E"], n_rows: int
    ) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self._hold(keys.expand(n_rows, -1, -1, -1), values.expand(n_rows, -1, -1, -1), 0)
        self.is_initialized = True

    def update(
        self,
        key_states: Float[Tensor, "B H T D"],
        value_states: Float[Tensor, "B H T E"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; all that are held come back."""
        assert self.keys is not None and self.values is not None
        start = self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        if stop > self._buffers[0].shape[-2]:
            self._hold(self.keys, self.values, stop - start)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = states
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Int[Tensor, " B"]) -> None:
        """Keep these rows only."""
        assert self.keys is not None and self.values is not None
        self._hold(self.keys[indices], self.values[indices], 0)

    def _hold(self, keys: Tensor, values: Tensor, n_coming: int) -> None:
        n_tokens = keys.shape[-2]
        room = n_tokens + n_coming + CHUNK_TOKENS
        self._buffers = [
            states.new_empty((*states.shape[:2], room, states.shape[-1]))
            for states in (keys, values)
        ]
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, :n_tokens] = states
        self.keys, self.values = (buffer[:, :, :n_tokens] for buffer in self._buffers)


def is_plain(cache: Any) -> bool:
    """Whether a cache holds all tokens of all layers, and nothing but their keys and values."""
    return type(cache) is DynamicCache and all(
        type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers
    )


@torch.no_grad()
def grow_in_place(cache: Any, n_rows: int) -> None:
    """Give a plain cache (`is_plain`) of one row or all rows layers that grow in place."""
    for layer_idx, layer in enumerate(cache.layers):
        cache.layers[layer_idx] = GrowingLayer(layer.keys, layer.values, n_rows)
