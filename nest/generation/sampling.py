"""How answers are drawn from a model's distributions."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated

from pydantic import Field, model_validator

from nest.conversations.conversation import Conversation
from nest.settings import AtLeastOne, NotNegative, settings

Temperature = Annotated[float, Field(ge=0, le=100)]
TopP = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Stop = tuple[Annotated[str, Field(min_length=1)], ...]
"""The same for all who take them."""


@settings("sampling settings")
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

    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: Annotated[int, NotNegative] = 0
    n: Annotated[int, AtLeastOne] = 1
    seed: Seed = 0
    stop: Stop = ()
    max_new_tokens: Annotated[int, AtLeastOne] = 256

    @model_validator(mode="after")
    def _goes_together(self) -> Sampling:
        if self.is_greedy and self.n > 1:
            raise ValueError(
                f"{self.n} answers at temperature 0 would all be the same; give a temperature"
            )
        if self.is_greedy and (self.top_p < 1 or self.top_k > 0):
            raise ValueError("top_p and top_k play no part at temperature 0; give a temperature")
        return self

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
