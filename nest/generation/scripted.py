"""Canned answers, for tests and documentation: no model is needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from nest.conversations.conversation import Conversation
from nest.errors import InputError
from nest.generation.engine import Completion
from nest.generation.sampling import Sampling
from nest.generation.texts import before_stop

Answers = Mapping[str, str | Sequence[str]] | Callable[[Conversation, int], str]
"""By what the user says last, an answer or one a sample; or a function of conversation and sample."""


class ScriptedEngine:
    """Says what it was told to say.

        engine = ScriptedEngine({"How do I boil an egg?": "Seven minutes."})
        engine = ScriptedEngine({"Heads or tails?": ["Heads.", "Tails."]})
        engine = ScriptedEngine(lambda conversation, sample: conversation.asked.upper())
        engine = ScriptedEngine({}, scores={"Is it?": {"Yes": -0.1, "No": -2.4}})

    An answer goes on from the prefill, unless it begins with it. Stop texts cut it; temperature, seed and
    `max_new_tokens` play no part.

    Args:
        answers: What it says.
        scores: By what the user says last, log-probabilities of candidates, for `log_probs`.

    Raises:
        InputError: an answer that is no text.
    """

    name = "scripted"

    def __init__(
        self, answers: Answers, *, scores: Mapping[str, Mapping[str, float]] | None = None
    ) -> None:
        self._answers, self._scores = answers, scores or {}

    @property
    def identity(self) -> str:
        """sha256 of the answers and scores; of a function its name alone."""
        answers = self._answers
        told = (
            getattr(answers, "__qualname__", type(answers).__qualname__)
            if callable(answers)
            else {
                asked: said if isinstance(said, str) else list(said)
                for asked, said in answers.items()
            }
        )
        scores = {asked: dict(row) for asked, row in self._scores.items()}
        return hashlib.sha256(json.dumps([told, scores], sort_keys=True).encode()).hexdigest()

    def generate(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        *,
        skip: Container[tuple[int, int]] = frozenset(),
    ) -> Iterator[Completion]:
        """Answers in the order of conversations and samples.

        Args:
            conversations: Each ends with a user turn.
            sampling: How many answers, and where they stop.
            skip: (conversation, sample) pairs that are not wanted.

        Raises:
            InputError: a conversation that ends with another turn, or that no answer was given for.
        """
        for conversation in conversations:
            conversation.require_open()
        return (
            self._completion(number, sample, conversation, sampling)
            for number, conversation in enumerate(conversations)
            for sample in range(sampling.n)
            if (number, sample) not in skip
        )

    def log_probs(
        self, conversations: Sequence[Conversation], candidates: Sequence[str]
    ) -> Float[np.ndarray, "B C"]:
        """The scores it was given; -inf for a candidate without one.

        Raises:
            InputError: a conversation without scores.
        """
        found = np.full((len(conversations), len(candidates)), -np.inf)
        for row, conversation in enumerate(conversations):
            told = self._scores.get(conversation.asked)
            if told is None:
                raise InputError(
                    f"no scores were given for the prompt {conversation.asked[:60]!r}; add them to scores="
                )
            found[row] = [told.get(candidate, -np.inf) for candidate in candidates]
        return found

    def _completion(
        self, number: int, sample: int, conversation: Conversation, sampling: Sampling
    ) -> Completion:
        said = self._said(conversation, sample).removeprefix(conversation.prefill)
        kept = before_stop(said, sampling.stop)
        text = conversation.prefill + (said if kept is None else kept)
        return Completion(number, sample, text, finish="stop")

    def _said(self, conversation: Conversation, sample: int) -> str:
        asked = conversation.asked
        if callable(self._answers):
            said: object = self._answers(conversation, sample)
        else:
            given = self._answers.get(asked)
            if given is None:
                raise InputError(
                    f"no answer was given for the prompt {asked[:60]!r}; add one to the engine's answers"
                )
            several = [given] if isinstance(given, str) else given
            if not isinstance(given, str) and sample >= len(several):
                raise InputError(
                    f"the prompt {asked[:60]!r} has {len(several)} answers, and sample {sample} is asked "
                    "for (they count from 0); add answers, or ask for fewer samples"
                )
            said = given if isinstance(given, str) else several[sample]
        if not isinstance(said, str):
            raise InputError(f"the answer to {asked[:60]!r} is {str(said)[:40]!r}; expected a text")
        return said
