"""Tiny random models, a tokenizer with a chat template, and prompts, for tests of whole stages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from nest.conversations.encoders import ChatEncoder
from nest.models.fingerprint import fingerprint
from nest.models.layouts import find_sites
from nest.models.sites import NeuronSite
from nest.selection.selection import NeuronSelection, SiteSelection
from nest.tuning.update import PARAMETER, ClusterUpdate

D, F, LAYERS, MAX_TOKENS = 16, 24, 2, 48
SPECIAL_TOKENS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[USER]", "[BOT]", "[SYS]"]
UNSAFE_WORDS = "poison bomb steal forge hack smuggle".split()
SAFE_WORDS = "bread garden paint sing knit travel".split()
FILLERS = "how do i please tell me about the best way to now today slowly".split()
ANSWERS = "sorry no cannot help with that sure here you go mix stir well done".split()
WORDS = UNSAFE_WORDS + SAFE_WORDS + FILLERS + ANSWERS
TEMPLATE = (
    "[BOS]{% for m in messages %}"
    "{% if m.role == 'system' %} [SYS] {{ m.content }}"
    "{% elif m.role == 'user' %} [USER] {{ m.content }}"
    "{% else %} [BOT] {{ m.content }} [EOS]{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} [BOT]{% endif %}"
)
_SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIAL_TOKENS) + len(WORDS),
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": MAX_TOKENS,
    # wide enough that activations differ between prompts by more than rounding
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(family: str = "qwen3", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A random transformers model in eval mode."""
    configs: dict[str, Any] = {
        "qwen3": lambda: transformers.Qwen3Config(**_SIZES, num_key_value_heads=1, head_dim=8),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SIZES),
        "phi3": lambda: transformers.Phi3Config(**_SIZES, num_key_value_heads=1),
        "opt": lambda: transformers.OPTConfig(
            vocab_size=_SIZES["vocab_size"],
            hidden_size=D,
            ffn_dim=F,
            word_embed_proj_dim=D,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            init_std=0.3,
            dropout=0.0,
        ),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=_SIZES["vocab_size"],
            n_embd=D,
            n_layer=LAYERS,
            n_head=2,
            n_positions=MAX_TOKENS,
            n_inner=F,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        ),
    }
    torch.manual_seed(seed)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(configs[family]())
    return model.to(dtype).eval()


def layout_of(family: str) -> list[NeuronSite] | None:
    """A layout for the families whose sites are not found: a fused and a transposed weight."""
    if family == "phi3":
        path = "model.layers.{}.mlp.gate_up_proj"
        return [
            NeuronSite(i, name, path.format(i), F, offset=offset)
            for i in range(LAYERS)
            for name, offset in (("gate_proj", 0), ("up_proj", F))
        ]
    if family == "gpt2":
        return [
            NeuronSite(i, "c_fc", f"transformer.h.{i}.mlp.c_fc", F, axis=1) for i in range(LAYERS)
        ]
    return None


def choose(
    model: nn.Module,
    family: str = "qwen3",
    neurons: Sequence[int] = (1, 4, 7, F - 1),
    clusters: Sequence[int] = (0, 1, 0, 1),
) -> NeuronSelection:
    """The same neurons at every site."""
    layout = layout_of(family)
    chosen = {site.name: (list(neurons), list(clusters)) for site in find_sites(model, layout)}
    return NeuronSelection.of(model, chosen, layout=layout)


def layer_wide(model: nn.Module) -> NeuronSelection:
    """The sites of a layer share two vectors, as `--cluster-scope layer` has it."""
    parts = [
        SiteSelection(
            site=site,
            neurons=torch.tensor([i, 6 + i, 11]),
            scores=torch.zeros(3),
            clusters=torch.tensor([0, 1, i % 2]),
            width=D,
            group=f"layer {site.layer}",
            n_clusters=2,
        )
        for i, site in enumerate(find_sites(model))
    ]
    return NeuronSelection(tuple(parts), fingerprint(model, [part.site for part in parts]))


class _Packed(nn.Module):
    """A quantised layer, as bitsandbytes has them: bytes in, floats out."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.values = linear.weight.detach().clone()
        bytes_ = self.values.flatten().view(torch.uint8)[:, None]
        self.weight = nn.Parameter(bytes_.clone(), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.values.T


def quantised(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            setattr(layer.mlp, name, _Packed(getattr(layer.mlp, name)))
    return model


def word_tokenizer(template: str | None = TEMPLATE) -> Any:
    """One token a word."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL_TOKENS + WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        additional_special_tokens=["[USER]", "[BOT]", "[SYS]"],
    )
    tokenizer.chat_template = template
    return tokenizer


def encoder_of(model: nn.Module) -> ChatEncoder:
    return ChatEncoder(word_tokenizer(), model)


def save_checkpoint(folder: Path, family: str = "qwen3", **kwargs: Any) -> Path:
    """A whole checkpoint: config, safetensors, tokenizer and chat template."""
    build(family, **kwargs).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def prompts(words: Sequence[str], n: int = 24, seed: int = 0) -> list[str]:
    """Prompts of many lengths, each with one of the words in it."""
    draw = torch.Generator().manual_seed(seed)

    def pick(choices: Sequence[str]) -> str:
        return choices[int(torch.randint(len(choices), (1,), generator=draw))]

    made = []
    for i in range(n):
        fillers = [pick(FILLERS) for _ in range(1 + i % 9)]
        made.append(" ".join([*fillers, words[i % len(words)], pick(FILLERS)]))
    return made


UNSAFE, SAFE = prompts(UNSAFE_WORDS), prompts(SAFE_WORDS, seed=1)
HARMFUL = [(prompt, "sorry no cannot help with that") for prompt in UNSAFE]
BENIGN = [(prompt, "sure here you go mix stir well") for prompt in SAFE]


def write_data(folder: Path) -> dict[str, str]:
    """The prompts above as files; their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        "unsafe": [{"prompt": p} for p in UNSAFE],
        "safe": [{"prompt": p} for p in SAFE],
        "harmful": [{"prompt": p, "response": r} for p, r in HARMFUL],
        "benign": [{"prompt": p, "response": r} for p, r in BENIGN],
        "pairs": [{"unsafe": u, "safe": s} for u, s in zip(UNSAFE, SAFE, strict=True)],
    }
    paths = {}
    for name, entries in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        paths[name] = str(path)
    return paths


def tokens(n_rows: int = 3, length: int = 7, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(7, 30, (n_rows, length), generator=draw)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def filled(update: ClusterUpdate, seed: int = 0) -> None:
    """An update away from its start, so that the gradients' dependence on U and s is seen."""
    draw = torch.Generator().manual_seed(seed)
    noise = 0.1 * torch.randn(update.packed.numel(), generator=draw)
    update.load_snapshot([update.packed.detach() + noise])


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer that is the model's own."""
    own = {
        name: value for name, value in model.state_dict().items() if not name.startswith(PARAMETER)
    }
    return {name: value.detach().clone() for name, value in own.items()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Bitwise, so that NaN equals itself and 0.0 does not equal -0.0."""
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype
        and torch.equal(
            value.contiguous().flatten().view(torch.uint8),
            second[name].contiguous().flatten().view(torch.uint8),
        )
        for name, value in first.items()
    )
