"""The random models that are measured: a small one for one CPU thread, an 8 B-shaped one for a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nest.models.layouts import find_sites
from nest.selection.selection import NeuronSelection
from nest.tuning.dialogues import Example, MicroBatch


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights, a batch, and how many neurons are tuned.

    Attributes:
        d_model: Width.
        d_ff: Neurons a projection.
        n_layers: Blocks.
        n_heads: Attention heads.
        n_key_value_heads: Of them with keys and values of their own.
        vocabulary: Tokens.
        dtype: Of the weights.
        n_rows: Dialogues a batch.
        n_tokens: Tokens a dialogue.
        n_targets: Of them the response's.
        n_neurons: Selected a projection.
        n_clusters: Clusters a projection.
    """

    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    vocabulary: int
    dtype: torch.dtype
    n_rows: int
    n_tokens: int
    n_targets: int
    n_neurons: int
    n_clusters: int = 4

    def model(self, device: torch.device, seed: int = 0) -> nn.Module:
        """The model; the same weights for the same seed."""
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=self.d_model,
            intermediate_size=self.d_ff,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_key_value_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(self.dtype)
            with device:
                model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        return model.eval().to(self.dtype)

    def micro_batch(self, seed: int = 0) -> MicroBatch:
        """Random dialogues of one length."""
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, self.vocabulary, (self.n_rows, self.n_tokens), generator=draw)
        n_prompt = self.n_tokens - self.n_targets
        examples = [Example(tuple(row.tolist()), n_prompt, benign=False) for row in ids]
        return MicroBatch.of(examples, pad_id=0)

    def selection(self, model: nn.Module, first_layer: int = 0) -> NeuronSelection:
        """Random neurons of gate and up projections, from a layer on."""
        draw = torch.Generator().manual_seed(1)
        chosen = {}
        for site in find_sites(model):
            neurons = torch.randperm(self.d_ff, generator=draw)[: self.n_neurons].tolist()
            if site.layer >= first_layer:
                chosen[site.name] = (
                    neurons,
                    [i % self.n_clusters for i in range(self.n_neurons)],
                )
        return NeuronSelection.of(model, chosen)


# 8.9 M parameters: below about 2 M the interpreter's overhead decides.
CPU = Shape(256, 1024, 8, 4, 4, 2048, torch.float32, 4, 64, 24, 32)
# For the gates: in fp64 they are of exact arithmetic, not of rounding.
TINY = Shape(32, 48, 2, 2, 1, 97, torch.float64, 4, 12, 5, 7, 3)
# For peak memory, 143 M parameters: small models drown in what the libraries hold.
CPU_MEMORY = Shape(1024, 4096, 8, 8, 8, 4096, torch.float32, 4, 64, 24, 32)
# Llama 3.1 8B's; neurons as the paper has them (about 2,000 of 917,504).
GPU = Shape(4096, 14336, 32, 32, 8, 128256, torch.bfloat16, 4, 512, 128, 32)


def shape_for(device: torch.device, *, memory: bool = False) -> Shape:
    """What is measured on a device."""
    if device.type == "cuda":
        return GPU
    return CPU_MEMORY if memory else CPU
