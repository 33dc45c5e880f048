"""Several turns, system turns of a row's own, prefilled answers, and which tokens are the assistant's."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from nest.conversations.batches import check_completion_mask, collate
from nest.conversations.conversation import Conversation, Part, Turn
from nest.conversations.encoders import CallableEncoder, ChatEncoder, encoder_for
from nest.conversations.prompting import Prompting
from nest.errors import InputError
from nest.prompts.prompt_set import from_values
from nest.tuning.dialogues import encode_dialogues, to_micro_batches

ASKED = Conversation.from_messages(
    [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "how"},
        {"role": "assistant", "content": "boil water"},
        {"role": "user", "content": "make tea"},
    ]
)
# As Qwen3 does: the thoughts of earlier turns are left out once later ones follow.
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'user' %} [USER] {{ m.content }}{% else %} [BOT] "
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %} [EOS]"
    "{% endif %}{% endfor %}{% if add_generation_prompt %} [BOT]{% endif %}"
)


def words(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def test_a_conversation_is_what_the_template_makes_of_all_its_turns(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer)
    asked = "[BOS] [SYS] be kind [USER] how [BOT] boil water [EOS] [PAD] [USER] make tea [BOT]"
    assert words(tokenizer, encoder.prompt(ASKED)) == asked
    ids, n_prompt = encoder.dialogue(ASKED, "no")
    assert ids[:n_prompt] == encoder.prompt(ASKED)
    assert words(tokenizer, ids[n_prompt:]) == "no [EOS]"


def test_a_rows_own_system_turn_goes_before_the_encoders(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer, system="do no")
    assert encoder.prompt(ASKED) == ChatEncoder(tokenizer).prompt(ASKED)
    alone = ChatEncoder(tokenizer).prompt(Conversation.of("how", system="do no"))
    assert encoder.prompt("how") == alone


def test_a_system_turn_that_the_template_drops_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("[SYS] {{ m.content }}", "")
    encoder = ChatEncoder(tokenizer)
    encoder.prompt("how")
    with pytest.raises(InputError, match="drops system prompts"):
        encoder.prompt(ASKED)


def test_all_turns_of_the_assistant_and_no_other_token(tokenizer: Any) -> None:
    ids, said = ChatEncoder(tokenizer).turns(ASKED.answered("no"))
    own = [token for token, mine in zip(ids, said, strict=True) if mine]
    assert words(tokenizer, own) == "boil water [EOS] no [EOS]"
    whole = (
        "[BOS] [SYS] be kind [USER] how [BOT] boil water [EOS] [PAD] [USER] make tea [BOT] no [EOS]"
    )
    assert words(tokenizer, ids) == whole


def test_of_one_turn_it_is_the_same_as_a_dialogue(tokenizer: Any, plain_tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match="no chat template"):
        plain = ChatEncoder(plain_tokenizer)
    for encoder in (ChatEncoder(tokenizer, system="be kind"), plain):
        ids, n_prompt = encoder.dialogue("make tea", "boil water")
        found, said = encoder.turns(Conversation.of("make tea").answered("boil water"))
        assert found == ids
        assert said == [False] * n_prompt + [True] * (len(ids) - n_prompt)


def test_slow_tokenizers_tell_the_same(tokenizer: Any) -> None:
    class Slow:
        is_fast = False

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    assert ChatEncoder(Slow()).turns(ASKED.answered("no")) == ChatEncoder(tokenizer).turns(
        ASKED.answered("no")
    )


def test_turns_that_are_written_otherwise_later_are_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    encoder = ChatEncoder(tokenizer)
    first = Conversation.of("how").answered("<think> I </think> boil")
    thinking = Conversation((*first.turns, Turn("user", "make tea")))
    encoder.dialogue(thinking, "no")
    with pytest.raises(InputError, match="--train-on last"):
        encoder.turns(thinking.answered("no"))


def test_a_prefill_is_the_prompts_and_the_rest_the_answers(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer)
    begun = Conversation.of("make tea", prefill="boil")
    assert words(tokenizer, encoder.prompt(begun)) == "[BOS] [USER] make tea [BOT] boil"
    ids, n_prompt = encoder.dialogue(begun, "boil water")
    assert ids == encoder.dialogue("make tea", "boil water")[0]
    assert words(tokenizer, ids[n_prompt:]) == "water [EOS]"
    with pytest.raises(InputError, match="does not begin with the prefill"):
        encoder.dialogue(begun, "no")


def test_a_prefill_closes_the_thought_that_the_prompt_opens(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% if add_generation_prompt %} [BOT]", "{% if add_generation_prompt %} [BOT] <think>"
    )
    encoder = ChatEncoder(tokenizer)
    begun = encoder.prompt(Conversation.of("make tea", prefill="boil"))
    assert words(tokenizer, begun).endswith("[BOT] <think> </think> boil")
    thinking = encoder.prompt(Conversation.of("make tea", prefill="<think> I"))
    assert words(tokenizer, thinking).endswith("[BOT] <think> I")


def test_what_is_no_text_or_awaits_no_answer_is_refused(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer)
    picture = Conversation((Turn("user", (Part("text", "how"), Part("image_url", "{}"))),))
    with pytest.raises(InputError, match="a part of the kind image_url"):
        encoder.prompt(picture)
    with pytest.raises(InputError, match="expected a user turn"):
        encoder.prompt(ASKED.answered("no"))
    with pytest.raises(InputError, match="no answer of the assistant"):
        encoder.turns(ASKED)


def test_functions_take_single_prompts_and_a_prefill() -> None:
    encoder = CallableEncoder(lambda text: [len(word) for word in text.split()], eos_id=0)
    begun = Conversation.of("make tea", prefill="boil")
    assert encoder.prompt(begun) == [4, 3, 4]
    assert encoder.dialogue(begun, "boil water") == ([4, 3, 4, 5, 0], 3)
    with pytest.raises(InputError, match=r"encode=\.\.\. takes a single text"):
        encoder.prompt(ASKED)


def test_encoders_of_ones_own_get_texts_where_there_is_nothing_else(tokenizer: Any) -> None:
    seen: list[Any] = []

    class Mine:
        pad_id, eos_ids, max_tokens = 0, frozenset[int](), None

        def prompt(self, prompt: Any) -> list[int]:
            seen.append(prompt)
            return [1]

        def dialogue(self, prompt: Any, response: str) -> tuple[list[int], int]:
            seen.append(prompt)
            return [1, 2], 1

        def decode(self, ids: Any) -> str:
            return ""

    encoder = encoder_for(nn.Module(), encode=Mine())
    encoder.prompt(Conversation.of("how"))
    encoder.dialogue(ASKED, "no")
    assert seen == ["how", ASKED]


def test_training_on_all_turns_or_the_last(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer)
    dialogues = from_values([(ASKED, "no"), (Conversation.of("how"), "boil water")])
    (last, alone) = encode_dialogues(encoder, dialogues, benign=True)
    (every, same) = encode_dialogues(encoder, dialogues, benign=True, train_on="all")
    assert alone == same
    assert (last.n_targets, every.n_targets) == (2, 5)
    (micro_batch,) = to_micro_batches([last, every], 2, 0)
    assert micro_batch.batch.completion_mask.sum(dim=1).tolist() == [2, 5]
    with pytest.raises(InputError, match="no turns"):
        encode_dialogues(
            encoder_for(nn.Module(), encode=_Single()),
            dialogues,
            benign=True,
            train_on="all",
        )


class _Single:
    pad_id, eos_ids, max_tokens = 0, frozenset[int](), None

    def prompt(self, prompt: Any) -> list[int]:
        return [1]

    def dialogue(self, prompt: Any, response: str) -> tuple[list[int], int]:
        return [1, 2], 1

    def decode(self, ids: Any) -> str:
        return ""


def test_masks_of_turns_are_padded_like_their_tokens() -> None:
    batch = collate([[5, 6, 7], [8, 9]], [[False, True, True], 1], 0, side="left")
    assert batch.completion_mask.tolist() == [[False, True, True], [False, False, True]]
    check_completion_mask(batch)


@pytest.mark.parametrize("prefill", [" ", "\n", "[", "EOS", "[EOS", "P", "boil [", "]"])
def test_a_prefill_of_letters_that_end_a_turn_ends_none(tokenizer: Any, prefill: str) -> None:
    """The template's own end of a turn may hold the same letters."""
    encoder = ChatEncoder(tokenizer)
    plain = encoder.prompt("make tea")
    begun = encoder.prompt(Conversation.of("make tea", prefill=prefill))
    assert begun[: len(plain)] == plain
    assert not encoder.eos_ids & set(begun[len(plain) :])


def test_a_prefill_that_only_opens_the_open_thought_adds_nothing(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% if add_generation_prompt %} [BOT]", "{% if add_generation_prompt %} [BOT] <think>"
    )
    encoder = ChatEncoder(tokenizer)
    opened = Conversation.of("make tea", prefill="<think>")
    assert encoder.prompt(opened) == encoder.prompt("make tea")


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("answer", ["  x", "é 日本 x  y", "a\n\n b"])
def test_of_one_turn_every_token_of_a_dialogue_is_learned(trim: bool, answer: str) -> None:
    """Also blanks, which a tokenizer with trimmed offsets says are nowhere."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trim)
    core.train_from_iterator(
        ["how do x and y go", "é 日本", "[USER] [BOT]"],
        trainers.BpeTrainer(
            special_tokens=["[EOS]"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[EOS]")
    fast.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.role == 'assistant' %}[EOS]{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    encoder = ChatEncoder(fast)
    ids, n_prompt = encoder.dialogue("how do x", answer)
    found, said = encoder.turns(Conversation.of("how do x").answered(answer))
    assert found == ids
    assert said == [False] * n_prompt + [True] * (len(ids) - n_prompt)


def test_the_system_prompt_of_older_artifacts_is_compared() -> None:
    then = Prompting.recorded_in({"system": "be kind"})
    assert then is not None
    (said,) = Prompting().differences(then, "the patch")
    assert "'be kind'" in said
