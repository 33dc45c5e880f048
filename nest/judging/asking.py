"""One answer to each conversation, where one that the engine refuses does not cost the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nest.conversations.conversation import Conversation
from nest.errors import InputError
from nest.generation.engine import Engine
from nest.generation.sampling import Sampling


class Answer(NamedTuple):
    """What an engine says to a conversation; or the fault that it finds in it."""

    text: str
    fault: str | None = None


def ask(
    engine: Engine,
    conversations: Sequence[Conversation],
    sampling: Sampling,
    *,
    must_take_all: bool = False,
) -> list[Answer]:
    """The engine's answers, in the conversations' order.

    All are asked at once. Where the engine refuses one of them (too long for the model, say), those that
    are not answered yet are asked one by one.

    Args:
        engine: Is asked.
        conversations: As the engine takes them.
        sampling: How it answers.
        must_take_all: Raise what the engine finds wrong with one of them.

    Raises:
        InputError: with `must_take_all`, a conversation that the engine refuses.
        EngineError: the engine failed.
    """
    found: dict[int, Answer] = {}
    try:
        for completion in engine.generate(conversations, sampling):
            found[completion.conversation] = Answer(completion.text)
    except InputError:
        if must_take_all:
            raise
        for number, conversation in enumerate(conversations):
            if number not in found:
                found[number] = _ask_one(engine, conversation, sampling)
    return [
        found.get(number, Answer("", "[not asked: the engine gave no answer]"))
        for number in range(len(conversations))
    ]


def _ask_one(engine: Engine, conversation: Conversation, sampling: Sampling) -> Answer:
    try:
        for completion in engine.generate([conversation], sampling):
            return Answer(completion.text)
    except InputError as fault:
        return Answer("", f"[not asked: {fault}]")
    return Answer("", "[not asked: the engine gave no answer]")
