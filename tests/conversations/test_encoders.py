"""Token ids of prompts and dialogues, their batches and masks."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import build
from torch import nn
from transformers import PreTrainedTokenizerFast

from nest.conversations.batches import bucketed_batches, check_completion_mask, collate
from nest.conversations.encoders import CallableEncoder, ChatEncoder, Encoder, encoder_for
from nest.errors import InputError, LayoutError
from nest.models.calls import logits_of, run_model

Tokenizer = PreTrainedTokenizerFast


def test_a_dialogue_is_the_generation_prompt_then_the_answer_up_to_its_end(
    tokenizer: Tokenizer,
) -> None:
    encoder = ChatEncoder(tokenizer)
    ids, n_prompt = encoder.dialogue("make tea", "boil water")
    assert ids[:n_prompt] == encoder.prompt("make tea")
    assert tokenizer.convert_ids_to_tokens(ids) == (
        ["[BOS]", "[USER]", "make", "tea", "[BOT]", "boil", "water", "[EOS]"]
    )
    assert encoder.decode([*ids[n_prompt:], 5, 5]) == "boil water"


def test_a_system_prompt_comes_first(tokenizer: Tokenizer) -> None:
    ids = ChatEncoder(tokenizer, system="be kind").prompt("make tea")
    assert tokenizer.convert_ids_to_tokens(ids)[1:4] == ["[SYS]", "be", "kind"]


def test_a_template_that_thinks_first_keeps_its_thinking_in_the_completion(
    tokenizer: Tokenizer,
) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "[BOT] {{ m.content }}", "[BOT] <think> </think> {{ m.content }}"
    )
    ids, n_prompt = ChatEncoder(tokenizer).dialogue("make tea", "no")
    assert tokenizer.convert_ids_to_tokens(ids[n_prompt:]) == ["<think>", "</think>", "no", "[EOS]"]


def test_a_rendering_that_does_not_extend_the_prompt_falls_back_to_the_response(
    tokenizer: Tokenizer,
) -> None:
    prompt = "[USER] {{ messages[-1].content }} [BOT]"
    tokenizer.chat_template = f"{{% if add_generation_prompt %}}{prompt}{{% else %}}x{{% endif %}}"
    ids, n_prompt = ChatEncoder(tokenizer).dialogue("make tea", "boil water")
    assert tokenizer.convert_ids_to_tokens(ids[n_prompt:]) == ["boil", "water", "[EOS]"]


def test_without_a_template_plain_text_warns_once(plain_tokenizer: Tokenizer) -> None:
    with pytest.warns(UserWarning, match="no chat template"):
        encoder = ChatEncoder(plain_tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids, n_prompt = encoder.dialogue("make tea", "boil water")
    assert plain_tokenizer.convert_ids_to_tokens(ids) == (
        ["User", ":", "make", "tea", "Assistant", ":", "boil", "water", "[EOS]"]
    )
    assert ids[:n_prompt] == encoder.prompt("make tea")


def test_a_template_that_refuses_is_an_input_error(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(InputError, match=r"System role not supported.*leave it out"):
        ChatEncoder(tokenizer, system="be kind").prompt("make tea")


def test_empty_responses_and_long_prompts_are_refused(tokenizer: Tokenizer) -> None:
    model = nn.Module()
    model.config = SimpleNamespace(max_position_embeddings=6)
    encoder = ChatEncoder(tokenizer, model)
    assert encoder.max_tokens == 6
    with pytest.raises(InputError, match="is empty"):
        encoder.dialogue("make tea", " \n")
    with pytest.raises(InputError, match="comes to 9 tokens, but the model's context is 6"):
        encoder.prompt("how do I make tea no")
    with pytest.raises(InputError, match="context is 6"):
        encoder.dialogue("make tea", "boil water")


def test_a_models_default_end_that_is_an_ordinary_word_ends_nothing(tokenizer: Tokenizer) -> None:
    model = nn.Module()
    tea = tokenizer.convert_tokens_to_ids("tea")
    bot = tokenizer.convert_tokens_to_ids("[BOT]")
    model.generation_config = SimpleNamespace(eos_token_id=[tea, bot])
    assert ChatEncoder(tokenizer, model).eos_ids == {tokenizer.eos_token_id, bot}


def test_callable_encoder() -> None:
    encoder = CallableEncoder(lambda text: [len(w) for w in text.split()], eos_id=0, max_tokens=5)
    assert isinstance(encoder, Encoder)
    assert encoder.dialogue("a bb", "ccc") == ([1, 2, 3, 0], 2)
    with pytest.raises(InputError, match="decode="):
        encoder.decode([1])
    with pytest.raises(InputError, match="context is 5"):
        encoder.prompt("a a a a a a")
    with pytest.raises(InputError, match="at least one token id"):
        encoder.prompt("")
    reading = CallableEncoder(lambda text: [1], lambda ids: str(ids), eos_id=9)
    assert reading.decode([1, 2, 9, 3]) == "[1, 2]"


def test_encoder_for_chooses(tokenizer: Tokenizer) -> None:
    model = nn.Module()
    assert isinstance(encoder_for(model, tokenizer), ChatEncoder)
    assert isinstance(encoder_for(model, encode=lambda text: [1]), CallableEncoder)
    own = CallableEncoder(lambda text: [1])
    assert encoder_for(model, tokenizer, own) is own
    with pytest.raises(InputError, match="give a tokenizer"):
        encoder_for(model)
    with pytest.raises(InputError, match="system prompt"):
        encoder_for(model, encode=lambda text: [1], system="be kind")


def test_batches_hold_every_index_once_in_order_of_length() -> None:
    lengths = [5, 1, 4, 2, 3, 9, 9]
    batches = bucketed_batches(lengths, 3)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert [[lengths[i] for i in batch] for batch in batches] == [[1, 2, 3], [4, 5, 9], [9]]
    assert bucketed_batches([], 3) == []
    with pytest.raises(InputError, match="at least 1"):
        bucketed_batches(lengths, 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_pads_and_masks(side: Any) -> None:
    batch = collate([[1, 2, 3], [4, 5]], [1, 1], pad_id=9, side=side, indices=[7, 8])
    own = [0, 1, 1] if side == "left" else [1, 1, 0]
    assert batch.attention_mask.tolist() == [[1, 1, 1], own]
    assert batch.input_ids[1].tolist() == ([9, 4, 5] if side == "left" else [4, 5, 9])
    second = [False, False, True] if side == "left" else [False, True, False]
    assert batch.completion_mask.tolist() == [[False, True, True], second]
    assert batch.indices == [7, 8]
    check_completion_mask(batch)
    assert not collate([[1]], None, 0).completion_mask.any()


def test_masks_that_teach_nothing_or_everything_are_refused() -> None:
    with pytest.raises(InputError, match="example 1 has no completion token"):
        check_completion_mask(collate([[1, 2], [1, 2]], [1, 2], 0))
    with pytest.raises(InputError, match="all 2 tokens of example 0"):
        check_completion_mask(collate([[1, 2]], [0], 0))
    batch = collate([[1, 2, 3], [1, 2]], [1, 1], 0)
    batch.completion_mask[1, 2] = True
    with pytest.raises(InputError, match="padding"):
        check_completion_mask(batch)


def test_any_module_can_be_run() -> None:
    ids = torch.tensor([[1, 2, 3]])
    llama = build("llama")
    expected = llama(input_ids=ids).logits
    found = logits_of(run_model(llama, ids, torch.ones_like(ids), use_cache=False))
    assert torch.equal(found, expected)
    custom = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    assert logits_of(run_model(custom, ids, torch.ones_like(ids))).shape == (1, 3, 8)
    assert logits_of({"logits": expected}) is expected
    assert logits_of((expected, None)) is expected
    with pytest.raises(LayoutError, match="expected logits"):
        logits_of(torch.zeros(3))
