"""Prompt and answer are looked at together: ends of turns, opened thoughts, tokens across the border."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from nest.conversations.encoders import CallableEncoder, ChatEncoder, encoder_for, rendered_hash
from nest.conversations.thoughts import strip_thinking
from nest.errors import InputError


def with_tokens(tokenizer: Any, *added: str) -> Any:
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    return tokenizer


def said(tokenizer: Any, ids: list[int]) -> list[str]:
    found: list[str] = tokenizer.convert_ids_to_tokens(ids)
    return found


# --- the turn's end is what the template writes after an answer --------------------------------------


def test_a_turn_ends_with_what_the_template_writes_and_not_with_another_eos(tokenizer: Any) -> None:
    with_tokens(tokenizer, "[END]")
    tokenizer.chat_template = tokenizer.chat_template.replace("[EOS] [PAD]", "[END]")
    encoder = ChatEncoder(tokenizer)
    assert said(tokenizer, sorted(encoder.eos_ids)) == ["[EOS]", "[END]"]
    ids, n_prompt = encoder.dialogue("make tea", "boil water")
    assert said(tokenizer, ids[n_prompt:]) == ["boil", "water", "[END]"]
    going_on = tokenizer.convert_tokens_to_ids(["boil", "[END]", "water", "[EOS]"])
    assert encoder.decode(going_on) == "boil"


@pytest.mark.parametrize("token", ["[EOS]", "[BOT]", "[USER]"])
def test_a_response_that_would_end_itself_is_refused(tokenizer: Any, token: str) -> None:
    with pytest.raises(InputError, match=rf"holds '\[{token[1:-1]}\]'.*take it out"):
        ChatEncoder(tokenizer).dialogue("make tea", f"boil {token} water")


def test_added_tokens_that_are_ordinary_text_stay_allowed(tokenizer: Any) -> None:
    """Gemma's vocabulary adds line feeds, and users add words."""
    tokenizer.add_tokens(["\n", "Acme"])
    tokenizer.chat_template = tokenizer.chat_template.replace("[BOT]", "[BOT]\n")
    encoder = ChatEncoder(tokenizer, system="You work for Acme. [USER]")
    encoder.dialogue("make tea", "boil\nwater for Acme")
    with pytest.raises(InputError, match="holds"):
        encoder.dialogue("make tea", "boil [USER]")


def test_special_tokens_without_a_role_are_not_in_the_text(tokenizer: Any) -> None:
    tokenizer.add_tokens([AddedToken("[HEAD]", special=True), AddedToken("kettle")])
    ids = tokenizer.convert_tokens_to_ids(["boil", "[HEAD]", "kettle", "[EOS]"])
    assert ChatEncoder(tokenizer).decode(ids) == "boil kettle"


# --- a thought that the prompt opens --------------------------------------------------------------


OPENING = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}[USER] {{ m.content }} "
    "{% else %}[BOT] {{ m.content.split('</think>')[-1] }} [EOS]{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[BOT] <think>{% endif %}"
)
# keeps the thought of the last answer, as Qwen's thinking models do
KEEPING = OPENING.replace(
    "[BOT] {{ m.content.split('</think>')[-1] }}",
    "[BOT] <think> {{ m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content }}"
    " </think> {{ m.content.split('</think>')[-1] }}",
)


@pytest.mark.parametrize("template", [OPENING, KEEPING], ids=["drops", "keeps"])
@pytest.mark.parametrize(
    ("response", "thought"), [("no water", []), ("<think> boil </think> no water", ["boil"])]
)
def test_a_thought_that_the_prompt_opens_is_closed_once(
    tokenizer: Any, template: str, response: str, thought: list[str]
) -> None:
    tokenizer.chat_template = template
    encoder = ChatEncoder(tokenizer)
    ids, n_prompt = encoder.dialogue("make tea", response)
    assert said(tokenizer, ids[:n_prompt])[-2:] == ["[BOT]", "<think>"]
    assert said(tokenizer, ids[n_prompt:]) == [*thought, "</think>", "no", "water", "[EOS]"]


def test_a_thought_that_was_cut_off_is_no_answer(tokenizer: Any) -> None:
    tokenizer.chat_template = OPENING
    encoder = ChatEncoder(tokenizer)
    cut = encoder.decode(tokenizer.convert_tokens_to_ids(["boil", "water"]))
    assert cut == "<think>boil water" and strip_thinking(cut) == ""
    whole = encoder.decode(tokenizer.convert_tokens_to_ids(["boil", "</think>", "no"]))
    assert strip_thinking(whole) == "no"


def test_tags_that_are_special_tokens_are_not_lost(tokenizer: Any) -> None:
    with_tokens(tokenizer, "[THINK]", "[/THINK]")
    ids = tokenizer.convert_tokens_to_ids(["[THINK]", "boil", "[/THINK]", "no", "[EOS]"])
    assert strip_thinking(ChatEncoder(tokenizer).decode(ids)) == "no"


# --- tokens across the border ---------------------------------------------------------------------


def llama2_like() -> Any:
    """A space is put before a text, and is part of the next word's token."""
    words = ["How", "sell", "At", "noon", "[I]", "[/I]"]
    pieces = ["<unk>", "<s>", "</s>", "▁", "\n", *words, *(f"▁{word}" for word in words)]
    vocabulary = [(piece, -float(20 - len(piece))) for piece in pieces]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (
            "{% for m in messages %}{% if m.role == 'user' %}[I] {{ m.content }} [/I]"
            "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
            ["▁At", "▁noon", "</s>"],
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' %}[I] {{ m.content }} [/I]"
            "{% else %}\n{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}\n{% endif %}",
            ["At", "▁noon", "</s>"],
        ),
    ],
    ids=["space", "newline"],
)
def test_the_answers_tokens_are_those_of_the_whole_chat(template: str, answer: list[str]) -> None:
    tokenizer = llama2_like()
    tokenizer.chat_template = template
    ids, n_prompt = ChatEncoder(tokenizer).dialogue("How sell", "At noon")
    assert said(tokenizer, ids[n_prompt:]) == answer
    chat = [{"role": "user", "content": "How sell"}, {"role": "assistant", "content": "At noon"}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.encode(whole, add_special_tokens=False)[: len(ids)] == ids


# --- what a template does not do ------------------------------------------------------------------


def test_a_system_prompt_that_the_template_drops_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("[SYS] {{ m.content }}", "")
    with pytest.raises(InputError, match="drops system prompts"):
        ChatEncoder(tokenizer, system="be kind")
    ChatEncoder(tokenizer)


def test_several_templates_without_a_default_are_a_sentence(tokenizer: Any) -> None:
    tokenizer.chat_template = {"one": "x", "two": "y"}
    with pytest.raises(InputError, match="multiple chat templates"):
        ChatEncoder(tokenizer)


def test_a_template_that_fails_inside_is_a_sentence(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0].content + none }}"
    with pytest.raises(InputError, match="refuses a prompt"):
        ChatEncoder(tokenizer)


def test_a_template_with_the_date_or_a_byte_order_mark_is_warned_of(tokenizer: Any) -> None:
    plain = tokenizer.chat_template
    tokenizer.chat_template = "{% if strftime_now is defined %}{% endif %}" + plain
    with pytest.warns(UserWarning, match="today's date"):
        ChatEncoder(tokenizer)
    tokenizer.chat_template = "\ufeff" + plain
    with pytest.warns(UserWarning, match="byte order mark"):
        ChatEncoder(tokenizer)


def test_the_hash_tells_what_was_rendered(tokenizer: Any) -> None:
    plain = [ChatEncoder(tokenizer).prompt("make tea")]
    told = [ChatEncoder(tokenizer, system="be kind").prompt("make tea")]
    assert rendered_hash(plain) == rendered_hash([list(plain[0])]) != rendered_hash(told)


# --- tokens that the model does not have ----------------------------------------------------------


class Small(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.table = nn.Embedding(n, 2)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids)


def test_padding_that_the_model_has_no_embedding_for_is_another(tokenizer: Any) -> None:
    n = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[FILL]"})
    assert tokenizer.pad_token_id == n
    assert ChatEncoder(tokenizer, Small(n)).pad_id == tokenizer.eos_token_id
    assert ChatEncoder(tokenizer, Small(n + 1)).pad_id == n


def test_a_word_that_the_model_has_no_embedding_for_is_a_sentence(tokenizer: Any) -> None:
    tokenizer.add_tokens(["kettle"])
    encoder = ChatEncoder(tokenizer, Small(len(tokenizer) - 1))
    encoder.prompt("make tea")
    with pytest.raises(InputError, match=r"'kettle', and the model has embeddings for \d+ tokens"):
        encoder.prompt("kettle")
    own = encoder_for(Small(3), encode=lambda text: [len(text)])
    assert isinstance(own, CallableEncoder) and own.prompt("ab") == [2]
    with pytest.raises(InputError, match="embeddings for 3 tokens only"):
        own.prompt("abc")


@pytest.mark.parametrize("what", ["prompt", "response", "system"])
def test_half_a_character_is_a_sentence(tokenizer: Any, what: str) -> None:
    half = "tea \ud83d"
    with pytest.raises(InputError, match=f"the {what}.*lone surrogate"):
        if what == "system":
            ChatEncoder(tokenizer, system=half)
        else:
            texts = {"prompt": "make", "response": "boil", what: half}
            ChatEncoder(tokenizer).dialogue(texts["prompt"], texts["response"])
