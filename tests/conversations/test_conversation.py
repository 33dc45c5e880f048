"""Turns in order, and what is no conversation."""

from typing import Any

import pytest

from nest.conversations.conversation import Conversation, Part, Turn, as_conversation
from nest.errors import InputError

SEVERAL = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "how"},
    {"role": "assistant", "content": "so"},
    {"role": "user", "content": "and then"},
]
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


def test_what_is_asked_and_what_was_said_before() -> None:
    found = Conversation.from_messages(SEVERAL)
    assert found.messages() == SEVERAL
    assert (found.asked, found.system, found.is_plain) == ("and then", "be kind", False)
    changed = found.with_asked("or else")
    assert changed.messages()[:3] == SEVERAL[:3]
    assert changed.asked == "or else"
    assert found.answered("thus").split_answer() == (found, "thus")
    assert found.split_answer() == (found, None)
    assert found.with_system("other") is found
    assert Conversation.of("how").with_system("other").system == "other"
    assert as_conversation("how") == Conversation.of("how")
    assert Conversation.of("how").is_plain
    assert not Conversation.of("how", prefill="So").is_plain


def test_parts_of_text_are_a_text_and_others_stay_apart() -> None:
    texts = [{"type": "text", "text": "see"}, {"type": "text", "text": "this"}]
    assert Conversation.from_messages([{"role": "user", "content": texts}]).asked == "see\nthis"
    mixed = Conversation.from_messages([{"role": "user", "content": [*texts, IMAGE]}])
    assert mixed.turns[0].other_kinds == ("image_url",)
    assert mixed.asked == "see\nthis"
    assert mixed.messages()[0]["content"] == [*texts, IMAGE]
    other = mixed.with_asked("what?").turns[0].content
    assert other[0] == Part("text", "what?") and len(other) == 2
    assert hash(mixed) == hash(Conversation(mixed.turns))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "expected a list of turns"),
        ([], "has no turn of a user"),
        (["hello"], "expected an object with role and content"),
        ([{"role": "user"}], "content is None"),
        ([{"role": "user", "content": " "}], "the user turn is empty"),
        ([{"role": "user", "content": []}], "expected a string, or a list of parts"),
        ([{"role": "user", "content": [{"text": "x"}]}], "expected an object with a type"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "whose text is 3"),
        ([{"role": 3, "content": "x"}], "role is 3"),
        ([{"role": "wizard", "content": "x"}, SEVERAL[1]], "known roles are"),
        ([SEVERAL[0]], "has no turn of a user"),
        ([SEVERAL[2]], "has no turn of a user"),
        ([SEVERAL[1], SEVERAL[0]], "can only be the first"),
        ([{"role": "assistant", "content": "", "tool_calls": [1]}], "calls tools"),
    ],
)
def test_what_is_no_conversation_has_its_sentence(messages: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Conversation.from_messages(messages, "chats.jsonl, line 3: messages")
    assert "chats.jsonl, line 3" in str(caught.value)


def test_only_a_conversation_that_awaits_an_answer_is_answered() -> None:
    answered = Conversation.of("how").answered("so")
    with pytest.raises(InputError, match="ends with the turn of the assistant"):
        answered.require_open()
    with pytest.raises(InputError, match="prefill after the assistant"):
        Conversation(answered.turns, prefill="So")
    with pytest.raises(InputError, match="no turn of a user"):
        Conversation((Turn("system", "x"),))
