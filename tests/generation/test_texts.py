"""Answers go on from their prefills as one text, and end before a stop text."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from tiny_decoders import words_encoder
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nest.conversations.conversation import Conversation
from nest.conversations.encoders import ChatEncoder
from nest.generation.texts import before_stop, continuation, cut_at_stop

CORPUS = [
    "Sure, here is how: first, boil the water.\n\n1. Take an egg. 2. Wait. User: Thanks! naïve café",
    "I'm sorry, but I can't help with that. Let me explain why. <think> no </think> 日本語",
] * 20
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>OPEN{% endif %}"
)
ANSWERS = [
    "is how: first, boil the water.",
    " here is how",
    "\n\n1. Take an egg.",
    "! naïve café",
    "",
]
PREFILLS = ["Sure, ", "Sure,", "Sure, here is how:\n", "I", "naïve 日本語 "]


def encoder(kind: str, opened: str = "", trims: bool = False) -> ChatEncoder:
    """Byte-level as GPT-2's, or with blanks before words as Llama's."""
    core = Tokenizer(models.BPE())
    if kind == "bytes":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        core.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = sorted(set("".join(CORPUS)))
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False),
    )
    tags = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    core.add_special_tokens([AddedToken(tag, special=True) for tag in tags])
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    template = CHAT.replace("OPEN", opened)
    tokenizer.chat_template = (
        template.replace("m.content", "m.content | trim") if trims else template
    )
    return ChatEncoder(tokenizer)


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("opened", ["", "<think>\n"])
@pytest.mark.parametrize("kind", ["bytes", "blanks"])
def test_prefill_and_what_follows_are_one_text(kind: str, opened: str, trims: bool) -> None:
    own, n_seen = encoder(kind, opened, trims), 0
    for prefill, said in product(PREFILLS, ANSWERS):
        conversation = Conversation.of("How?", prefill=prefill)
        prompt, before = own.prompt(conversation), own._template.prompt(conversation)
        is_trimmed = before.endswith(prefill.rstrip()) and prefill != prefill.rstrip()
        whole = own._tokens(before + said)
        if whole[: len(prompt)] != prompt:
            continue  # no model says this: the end of the prompt and its beginning are one token
        n_seen += 1
        blanks = prefill[len(prefill.rstrip()) :]
        expected = said
        if is_trimmed:  # the model is to say the blanks
            expected = said.removeprefix(blanks) if said.startswith(blanks) else said.lstrip()
        found = continuation(own, prompt, prefill, whole[len(prompt) :])
        assert found == expected.rstrip(), (prefill, said)
    assert n_seen > 10


def test_without_a_prefill_it_is_what_the_encoder_makes_of_it() -> None:
    own = encoder("bytes", "<think>\n")
    prompt, ids = own.prompt("How?"), own._tokens("no </think> Sure")
    assert continuation(own, prompt, "", ids) == "<think>no </think> Sure"


def test_a_thought_that_the_prefill_has_closed_is_not_opened_again() -> None:
    own = encoder("bytes", "<think>\n")
    prompt = own.prompt(Conversation.of("How?", prefill="Sure,"))
    assert continuation(own, prompt, "Sure,", own._tokens(" here is how")) == " here is how"


def test_an_earlier_turn_that_ends_with_the_end_token_is_no_end() -> None:
    own = encoder("bytes")
    turns = [("user", "How?"), ("assistant", "Wait."), ("user", "Why?")]
    asked = Conversation.from_messages([{"role": r, "content": c} for r, c in turns])
    begun = Conversation(asked.turns, prefill="Sure, here")
    assert continuation(own, own.prompt(begun), begun.prefill, own._tokens(" is how")) == " is how"


def test_a_text_before_the_first_of_the_stop_texts() -> None:
    assert before_stop("one two three", ["three", " two"]) == "one"
    assert before_stop("one two three", ["four"]) is None
    assert before_stop("one", ["one"]) == ""
    assert before_stop("one", []) is None


@pytest.mark.parametrize("n_beyond", range(5))
def test_how_far_an_engine_went_on_is_not_seen(n_beyond: int) -> None:
    own, ids = words_encoder(), [7, 8, 9, 10, 11, 12, 13, 14]
    text, kept, is_cut = cut_at_stop(own, [6], "", ids[: 4 + n_beyond], ("12 13", "8 9 1"))
    assert (text, kept, is_cut) == ("7", [7, 8, 9, 10], True)
    assert cut_at_stop(own, [6], "", ids, ("15",))[1:] == (ids, False)


def test_a_stop_text_in_the_prefill_ends_nothing() -> None:
    own = encoder("bytes")
    prompt = own.prompt(Conversation.of("How?", prefill="Sure, first,"))
    ids = own._tokens(" boil the water. first, Take an egg.")
    text, kept, is_cut = cut_at_stop(own, prompt, "Sure, first,", ids, ("first,",))
    assert (text, is_cut) == (" boil the water.", True) and len(kept) < len(ids)
