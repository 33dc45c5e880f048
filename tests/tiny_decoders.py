"""Tiny random models and an encoder of words, shared by the tests of this folder."""

import torch
from torch import nn

from nest.conversations.encoders import CallableEncoder

VOCABULARY = 64
EOS = 5


def tiny(family, layers=2):
    """A random transformers model, its weights spread enough to say varied things."""
    import transformers as tf

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    if family == "llama":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(num_key_value_heads=2, **sizes))
    elif family == "qwen3":
        model = tf.Qwen3ForCausalLM(tf.Qwen3Config(num_key_value_heads=2, head_dim=8, **sizes))
    elif family == "gemma3":
        config = tf.Gemma3TextConfig(
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            **sizes,
        )
        model = tf.Gemma3ForCausalLM(config)
    elif family == "gpt2":  # absolute positions: shifting them changes the answer
        config = tf.GPT2Config(
            n_embd=32, n_layer=layers, n_head=4, n_positions=128, **sizes | {"hidden_size": 32}
        )
        model = tf.GPT2LMHeadModel(config)
        torch.nn.init.normal_(model.transformer.wpe.weight, std=1.0)
    else:
        model = tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**sizes))
    return model.eval()


class Recurrent(nn.Module):
    """A custom module: no cache, no mask, logits as a bare tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.cell = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, VOCABULARY)
        nn.init.normal_(self.head.weight, std=3.0)
        nn.init.normal_(self.embedding.weight, std=3.0)

    def forward(self, tokens):
        return self.head(self.cell(self.embedding(tokens))[0])


def words_encoder(max_tokens=128, eos_id=EOS):
    """Prompts are numbers with blanks between them, `3 17 9`; so are answers."""
    return CallableEncoder(
        lambda text: [int(word) for word in text.split()],
        lambda ids: " ".join(str(token) for token in ids),
        eos_id=eos_id,
        max_tokens=max_tokens,
    )


def number_prompts(count, shortest, longest, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [
        torch.randint(6, VOCABULARY, (length,), generator=generator).tolist() for length in lengths
    ]
