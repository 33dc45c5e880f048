"""Conversations: turns with roles, and what the model is to answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nest.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that a turn may have; whether a model knows them is its template's to say."""

SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class Part:
    """One piece of a turn that is made of several: a text, or something that is none.

    Attributes:
        kind: `text`, `image_url`, `input_audio`, ...: the part's `type`.
        value: The text, or of other kinds the part's entries as JSON.
    """

    kind: str
    value: str

    def to_dict(self) -> dict[str, Any]:
        """As chat templates and servers take it."""
        if self.kind == "text":
            return {"type": "text", "text": self.value}
        entries: dict[str, Any] = json.loads(self.value)
        return {"type": self.kind, **entries}


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        role: One of `ROLES`.
        content: A text, or parts of which at least one is none.
    """

    role: str
    content: str | tuple[Part, ...]

    @property
    def text(self) -> str:
        """Its text; of a turn in parts the texts, one a line."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.value for part in self.content if part.kind == "text")

    @property
    def other_kinds(self) -> tuple[str, ...]:
        """The kinds of its parts that are no text."""
        if isinstance(self.content, str):
            return ()
        return tuple(part.kind for part in self.content if part.kind != "text")

    def to_dict(self) -> dict[str, Any]:
        """As chat templates and servers take it."""
        content = self.content
        if not isinstance(content, str):
            return {"role": self.role, "content": [part.to_dict() for part in content]}
        return {"role": self.role, "content": content}

    def with_text(self, text: str) -> Turn:
        """The same turn saying something else; parts that are no text stay."""
        if isinstance(self.content, str):
            return replace(self, content=text)
        others = (part for part in self.content if part.kind != "text")
        return replace(self, content=(Part("text", text), *others))


@dataclass(frozen=True)
class Conversation:
    """Turns in order: a system turn or none, then user and assistant.

        Conversation.of("How do I boil an egg?")
        Conversation.of("How?", system="Be brief.", prefill="Sure, ")
        Conversation.from_messages([{"role": "user", "content": "How?"}, ...])

    Attributes:
        turns: At least one that is no system turn.
        prefill: How the answer begins; the model goes on from there.

    Raises:
        InputError: no turns, an unknown role, a system turn that is not the first, a turn without
            content, or a prefill after an assistant's turn.
    """

    turns: tuple[Turn, ...]
    prefill: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.turns, tuple):
            object.__setattr__(self, "turns", tuple(self.turns))
        for turn in self.turns:
            parts = isinstance(turn, Turn) and isinstance(turn.content, (str, tuple))
            if not parts or not isinstance(turn.role, str):
                raise InputError(
                    f"a conversation has the turn {_short(turn)}; expected Turn(role, text or parts)"
                )
        fault = _fault_of(self.turns, self.prefill)
        if fault is not None:
            raise InputError(f"a conversation {fault}")

    @staticmethod
    def of(prompt: str, *, system: str | None = None, prefill: str = "") -> Conversation:
        """One user turn, and a system turn if any."""
        first = () if system is None else (Turn("system", system),)
        return Conversation((*first, Turn("user", prompt)), prefill)

    @staticmethod
    def from_messages(messages: object, where: str = "messages") -> Conversation:
        """Read a list of `{"role": ..., "content": ...}`.

        Args:
            messages: Content is a text, or parts such as `{"type": "text", "text": ...}`; parts that are
                all texts become one text.
            where: Named in errors.

        Raises:
            InputError: something else, or turns that are no conversation.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
            raise InputError(f"{where} is {_short(messages)}; expected a list of turns")
        turns = tuple(_turn(item, f"{where}, turn {i}") for i, item in enumerate(messages, start=1))
        fault = _fault_of(turns, "")
        if fault is not None:
            raise InputError(f"{where} {fault}")
        return Conversation(turns)

    def messages(self) -> list[dict[str, Any]]:
        """As chat templates and servers take it; the prefill is no turn."""
        return [turn.to_dict() for turn in self.turns]

    @property
    def asked(self) -> str:
        """What the user says last."""
        return next((turn.text for turn in reversed(self.turns) if turn.role == "user"), "")

    @property
    def system(self) -> str | None:
        """What the system turn says; None where there is none."""
        first = self.turns[0]
        return first.text if first.role in SYSTEM_ROLES else None

    @property
    def is_plain(self) -> bool:
        """Whether it is one user turn of text and nothing else."""
        only = len(self.turns) == 1 and isinstance(self.turns[0].content, str)
        return only and self.turns[0].role == "user" and not self.prefill

    @property
    def awaits_answer(self) -> bool:
        """Whether it is the assistant's turn."""
        return self.turns[-1].role in ("user", "tool")

    def require_open(self) -> None:
        """Refuse a conversation that there is nothing to answer in.

        Raises:
            InputError: it ends with another turn than the user's.
        """
        if not self.awaits_answer:
            raise InputError(
                f"the conversation ends with the turn of the {self.turns[-1].role} "
                f"({self.turns[-1].text[:40]!r}); expected a user turn, which is what is answered (the "
                "beginning of an answer is given as prefill)"
            )

    def with_asked(self, text: str) -> Conversation:
        """The same with another text in the last user turn: what an attack makes of it."""
        last = max(i for i, turn in enumerate(self.turns) if turn.role == "user")
        changed = self.turns[last].with_text(text)
        return replace(self, turns=(*self.turns[:last], changed, *self.turns[last + 1 :]))

    def with_system(self, text: str | None) -> Conversation:
        """With this system turn, where it has none of its own."""
        if text is None or self.system is not None:
            return self
        return replace(self, turns=(Turn("system", text), *self.turns))

    def answered(self, response: str) -> Conversation:
        """With the assistant's turn; a response begins with the prefill, if there is any."""
        return Conversation((*self.turns, Turn("assistant", response)))

    def split_answer(self) -> tuple[Conversation, str | None]:
        """What was asked, and the assistant's last turn; None where it was not answered yet."""
        if self.turns[-1].role != "assistant":
            return self, None
        return Conversation(self.turns[:-1]), self.turns[-1].text


Prompt = str | Conversation
"""What the encoders take: a user's turn, or all turns so far."""


def as_conversation(prompt: Prompt) -> Conversation:
    """A text as the one user turn; a conversation as it is."""
    return Conversation.of(prompt) if isinstance(prompt, str) else prompt


def _fault_of(turns: Sequence[Turn], prefill: str) -> str | None:
    if not any(turn.role not in SYSTEM_ROLES for turn in turns):
        return "has no turn of a user; expected at least one"
    for i, turn in enumerate(turns):
        if turn.role not in ROLES:
            return f"has a turn of {turn.role[:40]!r}; the known roles are {', '.join(ROLES)}"
        if turn.role in SYSTEM_ROLES and i > 0:
            return f"has a {turn.role} turn in place {i + 1}; it can only be the first"
    if not any(turn.role == "user" for turn in turns):
        return "has no turn of a user; expected at least one"
    if prefill and turns[-1].role == "assistant":
        return "has a prefill after the assistant's turn; expected it after the user's"
    return None


def _turn(item: object, where: str) -> Turn:
    if not isinstance(item, Mapping):
        raise InputError(f"{where} is {_short(item)}; expected an object with role and content")
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str):
        raise InputError(f"{where}: role is {_short(role)}; expected one of {', '.join(ROLES)}")
    if item.get("tool_calls"):
        raise InputError(f"{where} calls tools, which is not supported; take the row out")
    if isinstance(content, str):
        if not content.strip():
            raise InputError(f"{where}: the {role} turn is empty; fill it in or take the row out")
        return Turn(role, content)
    if not isinstance(content, Sequence) or not content:
        raise InputError(
            f"{where}: content is {_short(content)}; expected a string, or a list of parts"
        )
    parts = tuple(_part(part, where) for part in content)
    if all(part.kind == "text" for part in parts):
        text = "\n".join(part.value for part in parts)
        if not text.strip():
            raise InputError(f"{where}: the {role} turn is empty; fill it in or take the row out")
        return Turn(role, text)
    return Turn(role, parts)


def _part(item: object, where: str) -> Part:
    if isinstance(item, str):
        return Part("text", item)
    kind = item.get("type") if isinstance(item, Mapping) else None
    if not isinstance(item, Mapping) or not isinstance(kind, str):
        raise InputError(f"{where} has the part {_short(item)}; expected an object with a type")
    if kind == "text":
        text = item.get("text")
        if not isinstance(text, str):
            raise InputError(f"{where} has a part whose text is {_short(text)}; expected a string")
        return Part("text", text)
    others = {key: value for key, value in item.items() if key != "type" and value is not None}
    return Part(kind, json.dumps(others, sort_keys=True, default=str))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
