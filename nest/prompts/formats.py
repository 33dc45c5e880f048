"""Conversations as other people's files write them: OpenAI's, ShareGPT's, TRL's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nest.conversations.conversation import Conversation
from nest.errors import InputError
from nest.prompts.table import shortened
from nest.prompts.text import check_unicode

CHAT_COLUMNS = ("messages", "conversations", "conversation")
"""Columns that hold whole conversations: OpenAI's and TRL's `messages`, ShareGPT's `conversations`."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
}
"""What ShareGPT and its kin call the sides in `from`."""


def is_chat(value: Any) -> bool:
    """Whether a cell holds turns and not a text."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def chat(value: Any, column: str, where: str) -> Conversation:
    """A conversation from a list of `{"role", "content"}` or of ShareGPT's `{"from", "value"}`.

    Raises:
        InputError: anything else.
    """
    if not is_chat(value) or not all(isinstance(turn, Mapping) for turn in value):
        raise InputError(f"{where}: {column} is {shortened(value)}; expected a list of turns")
    conversation = Conversation.from_messages(
        [_opened(turn, f"{where}: {column}") for turn in value], f"{where}: {column}"
    )
    for turn in conversation.turns:
        check_unicode(turn.text, f"{turn.role} turn", where)
    return conversation


def answer(value: Any, asked: Conversation, column: str, where: str) -> str | None:
    """An answer from a cell: a text, or the assistant's turn, alone or after those that were asked.

    Raises:
        InputError: turns that do not end with the assistant's, or that ask something else.
    """
    if not is_chat(value):
        return value if isinstance(value, str) else None
    turns = [
        _opened(turn, f"{where}: {column}") if isinstance(turn, Mapping) else turn for turn in value
    ]
    if len(turns) == 1 and isinstance(turns[0], Mapping) and turns[0].get("role") == "assistant":
        turns = [*asked.messages(), *turns]
    before, said = chat(turns, column, where).split_answer()
    if said is None or before.turns != asked.turns:
        raise InputError(
            f"{where}: {column} holds other turns than the prompt and an answer to it; expected the "
            "assistant's turn"
        )
    return said


def _opened(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A turn with the keys `role` and `content`, whoever wrote it."""
    if "role" in turn or "from" not in turn:
        return dict(turn)
    side = turn["from"]
    role = _SHAREGPT_ROLES.get(side.strip().lower()) if isinstance(side, str) else None
    if role is None:
        raise InputError(
            f"{where} has a turn from {shortened(side)}; the known sides are "
            f"{', '.join(_SHAREGPT_ROLES)}"
        )
    return {"role": role, "content": turn.get("value")}
