"""How answers are drawn from a model's distributions."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

from nest.conversations.conversation import Conversation
from nest.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How many answers, how long, and by what chance; all faults are reported together.

    Attributes:
        temperature: Logits are divided by it; 0 takes the likeliest token each time.
        top_p: Only the fewest of the likeliest tokens whose probabilities reach this sum, in (0, 1]; of
            those that `top_k` leaves.
        top_k: Only so many of the likeliest tokens; 0 takes all.
        n: Answers to each conversation.
        seed: A drawn answer depends on it, the conversation and the answer's number.
        stop: An answer ends before the first of these texts; one in the prefill does not count.
        max_new_tokens: Longest answer, in tokens.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        faults = []
        if not math.isfinite(self.temperature) or not 0 <= self.temperature <= 100:
            faults.append(f"temperature is {self.temperature}; it must lie in 0 to 100")
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            faults.append(f"top_k is {self.top_k}; it must be at least 0 (which takes all)")
        if self.n < 1:
            faults.append(f"n is {self.n}; it must be at least 1")
        if not 0 <= self.seed < 2**63:
            faults.append(f"seed is {self.seed}; it must lie in 0 to 2**63 - 1")
        if self.max_new_tokens < 1:
            faults.append(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if any(not text for text in self.stop):
            faults.append("stop holds an empty text; leave it out")
        if self.is_greedy and self.n > 1:
            faults.append(
                f"n is {self.n} and temperature 0: all answers would be the same; give a temperature"
            )
        if self.is_greedy and (self.top_p < 1 or self.top_k > 0):
            faults.append("top_p and top_k play no part at temperature 0; give a temperature")
        if faults:
            raise InputError("sampling settings: " + "; ".join(faults))

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature == 0


GREEDY = Sampling()


def request_seed(sampling: Sampling, conversation: Conversation, sample: int) -> int:
    """The seed of one answer, for engines that draw by themselves, below 2**31.

    Every answer has one of its own: with one seed for all, the first words of all answers would hang on
    one random number.
    """
    asked = [sampling.seed, sample, conversation.messages(), conversation.prefill]
    digest = hashlib.blake2b(json.dumps(asked).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
