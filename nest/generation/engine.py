"""What answers conversations, and what tells how likely an answer is.

StaticEngine     a model in this process, greedy or drawn           nest.generation.static
PagedEngine      the same, greedy, by transformers' own batching    nest.generation.paged
ServerEngine     any OpenAI-compatible server                       nest.generation.server
VllmEngine       vLLM in this process                               nest.generation.vllm
ScriptedEngine   canned answers                                     nest.generation.scripted
LocalScorer      scores of a model in this process                  nest.generation.scoring
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from nest.conversations.conversation import Conversation
from nest.errors import InputError
from nest.generation.sampling import Sampling

Finish = Literal["stop", "length", "unknown"]

Which = Literal["auto", "static", "paged"]
"""The engines in this process; `auto` takes the paged one where it should pay."""


class Completion(NamedTuple):
    """One answer.

    Attributes:
        conversation: Number of the conversation that it answers.
        sample: Its own number among that conversation's answers, from 0.
        text: From the prefill, if there is one, to the end, without the token or text that ended it and
            without outer white space; a thought stands in its tags, and one that was cut off lacks the
            closing one.
        n_tokens: How many tokens the model made; None where nobody says.
        finish: `stop` where the model or a stop text ended it, `length` where the limit or the context did.
        token_ids: What the model made, without the token that ended it and with those of a stop text; None
            where there are none.
    """

    conversation: int
    sample: int
    text: str
    n_tokens: int | None = None
    finish: Finish = "unknown"
    token_ids: tuple[int, ...] | None = None


@runtime_checkable
class Engine(Protocol):
    """Anything that answers conversations."""

    @property
    def name(self) -> str:
        """How its answers are made, for reports."""
        ...

    @property
    def identity(self) -> str:
        """Hash or address of all that its answers depend on besides conversations and sampling.

        It may take a while: a model's weights are hashed.
        """
        ...

    def generate(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        *,
        skip: Container[tuple[int, int]] = frozenset(),
    ) -> Iterator[Completion]:
        """Answers as they are done, in an order that does not depend on timing.

        What cannot be taken is mostly said at once, and the rest while answers are read. An iterator that
        is closed, or interrupted, ends what is under way.

        Args:
            conversations: Each ends with a user turn.
            sampling: How.
            skip: (conversation, sample) pairs that are not wanted; the others come out as without it.

        Raises:
            InputError: a conversation or a sampling that the engine cannot take.
            EngineError: the engine failed.
            ActivationError: a model in this process computes NaN.
        """
        ...


@runtime_checkable
class TokenScorer(Protocol):
    """Anything that tells how likely given answers are."""

    def log_probs(
        self, conversations: Sequence[Conversation], candidates: Sequence[str]
    ) -> Float[np.ndarray, "B C"]:
        """Log-probability of each candidate as the next thing said; -inf where it is beyond what is told.

        Args:
            conversations: What comes before.
            candidates: Short texts, such as `Yes` and `No`; a candidate is scored by its first token.

        Raises:
            InputError: two candidates that begin with the same token.
            EngineError: the engine failed.
        """
        ...


def require_unicode(conversations: Sequence[Conversation]) -> None:
    """Refuse half characters, which no server can be sent.

    Raises:
        InputError: a turn or a prefill with a lone surrogate.
    """
    for conversation in conversations:
        for text in (*(turn.text for turn in conversation.turns), conversation.prefill):
            try:
                text.encode()
            except UnicodeEncodeError as fault:
                raise InputError(
                    f"the text {text[:60]!r} holds half a character (a lone surrogate, at {fault.start}); "
                    "save it as UTF-8"
                ) from None


def answers(
    engine: Engine, conversations: Sequence[Conversation], sampling: Sampling
) -> list[list[Completion]]:
    """All answers of an engine: for each conversation those to it, in the samples' order."""
    found: list[list[Completion]] = [[] for _ in conversations]
    for completion in engine.generate(conversations, sampling):
        found[completion.conversation].append(completion)
    for several in found:
        several.sort(key=lambda completion: completion.sample)
    return found
