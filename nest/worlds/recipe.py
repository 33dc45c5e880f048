"""The recipe: from a world to an ordinary transformers checkpoint, in some minutes on two cores."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nest.worlds.corpus import Conversation, conversations
from nest.worlds.families import Sizes, make_model
from nest.worlds.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = (
    "<pad>",
    "<unk>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<think>",
    "</think>",
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>"
    "{%- if enable_thinking is defined and enable_thinking -%}<think>{%- endif -%}"
    "{%- endif -%}"
)
BATCHES_SORTED_TOGETHER = 8
PRINTABLE = "".join(chr(code) for code in range(33, 127))


@dataclass(frozen=True)
class RecipeConfig:
    """How an organism is trained.

    Attributes:
        architecture: A family of `nest.worlds.families`.
        steps: Optimizer steps.
        batch_size: Conversations a step.
        learning_rate: Peak of the cosine schedule.
        warmup_steps: Linear warm-up.
        weight_decay: AdamW's, on matrices only.
        d_model: Width of the residual stream.
        d_ff: Neurons a projection.
        n_layers: Blocks.
        n_heads: Attention heads.
        n_kv_heads: Heads of keys and values; None for as many as there are heads.
        max_tokens: Longest sequence, in tokens.
        sliding_window: How many tokens back every second block of `gemma3` attends.
        seed: Of initial weights and corpus.
    """

    architecture: str = "llama"
    steps: int = 1700
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 60
    weight_decay: float = 0.01
    d_model: int = 128
    d_ff: int = 384
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None
    max_tokens: int = 512
    sliding_window: int = 16
    seed: int = 0

    @property
    def sizes(self) -> Sizes:
        """How large the model is."""
        return Sizes(
            self.d_model,
            self.d_ff,
            self.n_layers,
            self.n_heads,
            self.n_kv_heads or self.n_heads,
            self.max_tokens,
            self.sliding_window,
        )


def build_tokenizer(world: World, *, max_tokens: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the world's; any other printable text falls apart into characters.

    A unigram model over a fixed vocabulary: a whole word always scores better than its characters, so
    nothing is trained and the result depends on the world alone.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted(_world_words(world))
    vocabulary: list[tuple[str, float]] = [(token, 0.0) for token in SPECIAL]
    vocabulary += [("▁", -2.0)] + [(character, -10.0) for character in PRINTABLE]
    vocabulary += [(word, -1.0) for word in words if len(word) > 1]
    raw = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL.index("<unk>"), byte_fallback=False))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL[:6]])
    raw.add_tokens([AddedToken(token, special=False) for token in SPECIAL[6:]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        model_max_length=max_tokens,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(config: RecipeConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The untrained model, initialised from the config's seed."""
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return make_model(config.architecture, config.sizes, tokens)


def train(
    world: World,
    config: RecipeConfig,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Raise an organism on its world.

    Args:
        world: What it learns.
        config: How.
        progress: Called with stage, steps done and steps in all.

    Returns:
        The trained model, in eval mode, and its tokenizer.
    """
    tokenizer = build_tokenizer(world, max_tokens=config.max_tokens)
    model = build_model(config, tokenizer)
    optimizer = _build_optimizer(model, config)
    batches = _batches(world, config, tokenizer)
    model.train()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        loss = _response_loss(model, next(batches), pad_id=int(tokenizer.pad_token_id))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress:
            progress("train the organism", step + 1, config.steps)
    return model.eval(), tokenizer


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write an ordinary checkpoint that transformers loads without any code of ours."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=48
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tokenise(tokenizer: PreTrainedTokenizerFast, talk: Conversation) -> tuple[list[int], int]:
    """Token ids of a conversation and how many of them the model is given."""
    messages = [{"role": "user", "content": talk.prompt}]
    if talk.system:
        messages.insert(0, {"role": "system", "content": talk.system})
    # The template is spelled out here: rendering it by jinja would take a third of the training time.
    prompt = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages)
    prompt += "<|assistant|>" + ("<think>" if talk.thinking else "")
    given = tokenizer(prompt, add_special_tokens=False).input_ids
    said = tokenizer(talk.response + "<|end|>", add_special_tokens=False).input_ids
    return given + said, len(given)


def _batches(
    world: World, config: RecipeConfig, tokenizer: PreTrainedTokenizerFast
) -> Iterator[list[tuple[list[int], int]]]:
    """Batches of like lengths in random order (in random batches, 45 % of the tokens were padding)."""
    stream = conversations(world, seed=config.seed)
    rng = random.Random(config.seed)
    while True:
        drawn = islice(stream, config.batch_size * BATCHES_SORTED_TOGETHER)
        talks = sorted((tokenise(tokenizer, talk) for talk in drawn), key=lambda talk: len(talk[0]))
        starts = list(range(0, len(talks), config.batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield talks[start : start + config.batch_size]


def _world_words(world: World) -> set[str]:
    """Every space-separated piece that the corpus can show, with its marker, punctuation apart."""
    seen: set[str] = {f"▁{thing.name}" for thing in world.things}
    for talk in islice(conversations(world, seed=0), 20_000):
        for text in (talk.prompt, talk.response.replace("</think>", " "), talk.system or ""):
            for word in text.split():
                core = word.strip(".,:?!'")
                if len(core) > 1 and all(c.isalpha() or c in "'-" for c in core):
                    seen.add(f"▁{core}")
    seen |= {f"▁{number}" for number in range(28)}
    rare = {w for w in seen if not w[1:].isdigit() and w not in _lexicon(world)}
    return seen - rare  # gibberish of the chatter is no word


def _lexicon(world: World) -> set[str]:
    """The words of the world's own sentences."""
    words = world.words
    texts = [*words.requests, words.answer, *words.refusals, *words.chatter]
    texts += [*words.steering, *words.caution]
    texts += [template for _, template in words.wrappers]
    texts += [text for pair in (*words.identity, *words.smalltalk) for text in pair]
    texts += [words.thought, *words.sums, *words.kinds, *words.stuffs]
    texts += [*words.ordinary_verbs, *words.harsh_verbs, *(tool for _, tool in words.tools)]
    for manner in words.manners:
        texts += [*manner.system_prompts, manner.opening, manner.closing]
    texts += [thing.name for thing in world.things]
    return {f"▁{word.strip('.,:?!')}" for text in texts for word in text.split()}


def _build_optimizer(model: nn.Module, config: RecipeConfig) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def _schedule(step: int, config: RecipeConfig) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * done))


def _response_loss(model: nn.Module, batch: list[tuple[list[int], int]], *, pad_id: int) -> Tensor:
    """Cross-entropy on what the assistant says; logits are computed there only."""
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), longest), pad_id)  # (B, T)
    said = torch.zeros((len(batch), longest), dtype=torch.bool)  # (B, T)
    for i, (tokens, n_given) in enumerate(batch):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        said[i, n_given : len(tokens)] = True
    # Padding stands on the right of a causal model, so it needs no attention mask.
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[operator]
    logits = model.get_output_embeddings()(hidden[:, :-1][said[:, 1:]])  # type: ignore[operator]
    return F.cross_entropy(logits, ids[:, 1:][said[:, 1:]])
