"""What the engines in this process share: conversations as token ids, and answers as completions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Sequence

from torch import nn

from nest.conversations.conversation import Conversation
from nest.conversations.encoders import ChatEncoder, Encoder, rendered_hash
from nest.errors import InputError
from nest.generation.decoding import Decoded
from nest.generation.engine import Completion
from nest.generation.sampling import Sampling
from nest.generation.texts import before_stop, continuation, cut_at_stop


class Asked:
    """Conversations to be answered: each different prompt once.

    Conversations of the same tokens get the same answers: a drawn one depends on nothing else.

    Args:
        encoder: Of the model.
        conversations: Each ends with a user turn.
        sampling: How they are answered.
        skip: (conversation, sample) pairs that are not wanted.

    Attributes:
        prompts: Token ids, none twice.
        total: How many answers there are, wanted or not.

    Raises:
        InputError: a conversation that the encoder refuses.
    """

    def __init__(
        self,
        encoder: Encoder,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        skip: Container[tuple[int, int]] = frozenset(),
    ) -> None:
        strange = [each for each in conversations if not isinstance(each, Conversation)]
        if strange:
            raise InputError(
                f"{str(strange[0])[:60]!r} is a {type(strange[0]).__name__}; expected conversations, such "
                "as nest.Conversation.of(text)"
            )
        self._encoder, self._conversations = encoder, conversations
        self._stop, self._skip = sampling.stop, skip
        askers: dict[tuple[int, ...], list[int]] = {}
        for number, conversation in enumerate(conversations):
            askers.setdefault(tuple(encoder.prompt(conversation)), []).append(number)
        self.prompts = list(askers)
        self._askers = list(askers.values())
        self.total = len(conversations) * sampling.n

    def n_askers(self, prompts: Sequence[int]) -> int:
        """How many conversations have one of these prompts, given by number."""
        return sum(len(self._askers[prompt]) for prompt in prompts)

    def is_wanted(self, prompts: Sequence[int], samples: range) -> bool:
        """Whether an answer to one of these prompts is not skipped."""
        return any(
            (asker, sample) not in self._skip
            for prompt in prompts
            for asker in self._askers[prompt]
            for sample in samples
        )

    def is_over(self, prompt: int, token_ids: Sequence[int]) -> bool:
        """Whether what was said to a prompt holds a stop text."""
        return before_stop(self._continuation(prompt, token_ids), self._stop) is not None

    def completions(self, prompt: int, sample: int, decoded: Decoded) -> Iterator[Completion]:
        """An answer to a prompt, for each conversation that wants it."""
        said, token_ids, is_cut = cut_at_stop(
            self._encoder, self.prompts[prompt], self._prefill(prompt), decoded[0], self._stop
        )
        for asker in self._askers[prompt]:
            if (asker, sample) not in self._skip:
                yield Completion(
                    conversation=asker,
                    sample=sample,
                    text=self._conversations[asker].prefill + said,
                    n_tokens=len(token_ids),
                    finish="stop" if decoded.ended or is_cut else "length",
                    token_ids=tuple(token_ids),
                )

    def _continuation(self, prompt: int, token_ids: Sequence[int]) -> str:
        prefill = self._prefill(prompt)
        return continuation(self._encoder, self.prompts[prompt], prefill, token_ids)

    def _prefill(self, prompt: int) -> str:
        return self._conversations[self._askers[prompt][0]].prefill


def identity_of(model: nn.Module, encoder: Encoder) -> str:
    """sha256 of what a model's answers depend on besides conversations and sampling.

    These are its weights, what its template makes of a prompt, and the tokens that end an answer. The
    batch size is not among them: it changes no more than rounding.
    """
    from nest.models.fingerprint import weights_hash

    rendered = rendered_hash([encoder.prompt("Hello")]) if isinstance(encoder, ChatEncoder) else ""
    parts = [weights_hash(model), rendered, sorted(encoder.eos_ids), encoder.max_tokens]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
