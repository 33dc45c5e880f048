"""What a model is asked in an evaluation, and what for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nest.conversations.conversation import Conversation
from nest.conversations.encoders import Encoder, rendered_hash
from nest.errors import InputError
from nest.judging.judge import Exchange
from nest.prompts.attacks import NO_ATTACK, Attack, attacked
from nest.prompts.prompt_set import PromptSet

Kind = Literal["harmful", "borderline", "benign", "twin"]
"""`twin` is a harmless prompt put through an attack."""

JUDGED_KINDS: tuple[Kind, ...] = ("harmful", "borderline")
"""What a judge reads; the answers of the others are compared with a reference."""


@dataclass(frozen=True)
class Request:
    """A conversation to be answered, and what it is answered for.

    Attributes:
        kind: What it is for.
        attack: What it is put through.
        original: As it was before the attack, which is what is judged.
        reference: What compliance, or the one good answer, would say.
    """

    kind: Kind
    attack: Attack
    original: Conversation
    reference: str | None = None

    def asked(self) -> Conversation:
        """What the model gets."""
        return attacked(self.attack, self.original)

    def exchange(self, response: str) -> Exchange:
        """What a judge gets."""
        return Exchange(self.original, response, self.reference, self.kind == "borderline")


def requests_of(
    harmful: PromptSet,
    borderline: PromptSet | None,
    benign: PromptSet | None,
    attacks: Sequence[Attack],
    twin_prompts: int,
) -> list[Request]:
    """Every request of an evaluation, in order of kind, attack and prompt.

    Raises:
        InputError: no attacks, one name twice, or benign prompts without responses.
    """
    if not attacks or len({attack.name for attack in attacks}) != len(attacks):
        names = ", ".join(attack.name for attack in attacks) or "none at all"
        raise InputError(f"the attacks are {names}; expected at least one and each name once")
    references: Sequence[str | None] = harmful.responses or [None] * len(harmful)
    requests = [
        Request("harmful", attack, prompt, reference)
        for attack in attacks
        for prompt, reference in zip(harmful.conversations, references, strict=True)
    ]
    if borderline is not None:
        requests += [Request("borderline", NO_ATTACK, each) for each in borderline.conversations]
    if benign is not None:
        chats = benign.chats()
        requests += [Request("benign", NO_ATTACK, prompt, answer) for prompt, answer in chats]
        twins = [chats[index] for index in _spread(len(chats), twin_prompts)]
        requests += [
            Request("twin", attack, prompt, answer)
            for attack in attacks
            for prompt, answer in twins
        ]
    return requests


def check_encodable(encoder: Encoder, requests: Sequence[Request]) -> str:
    """Refuse, before any work, what the model cannot be asked.

    Returns:
        sha256 of the prompts as the model gets them: template, system prompt, date and all.

    Raises:
        InputError: names the attack that makes a prompt too long.
    """
    return rendered_hash(_encoded(encoder, request) for request in requests)


def hash_of(requests: Sequence[Request]) -> str:
    """sha256 of the originals, their attacks and references."""
    rows = [
        [r.kind, r.attack.name, r.original.messages(), r.original.prefill, r.reference]
        for r in requests
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _spread(n: int, at_most: int) -> list[int]:
    """At most so many indices, evenly spread: a sorted file is sampled from end to end."""
    count = min(n, at_most)
    return [index * n // count for index in range(count)]


def _encoded(encoder: Encoder, request: Request) -> list[int]:
    try:
        return encoder.prompt(request.asked())
    except InputError as error:
        if request.attack is NO_ATTACK:
            raise
        raise InputError(
            f"attack {request.attack.name!r}: {error} (or leave this attack out)"
        ) from None
