"""A tokenizer of whole words with a chat template, for tests that need no more."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[USER]", "[BOT]", "[SYS]"]
WORDS = [
    "User",
    ":",
    "Assistant",
    "be",
    "kind",
    "how",
    "do",
    "I",
    "make",
    "tea",
    "boil",
    "water",
    "no",
    "<think>",
    "</think>",
]
TEMPLATE = (
    "[BOS]{% for m in messages %}"
    "{% if m.role == 'system' %} [SYS] {{ m.content }}"
    "{% elif m.role == 'user' %} [USER] {{ m.content }}"
    "{% else %} [BOT] {{ m.content }} [EOS] [PAD]{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} [BOT]{% endif %}"
)


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    core = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(SPECIAL_TOKENS + WORDS)}, unk_token="[UNK]")
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(":", "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        additional_special_tokens=["[USER]", "[BOT]", "[SYS]"],
    )
    tokenizer.chat_template = template
    return tokenizer
