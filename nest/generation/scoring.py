"""How likely a model in this process is to begin its answer with given texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nest.conversations.conversation import Conversation
from nest.conversations.encoders import Encoder
from nest.errors import ActivationError, InputError
from nest.generation.batches import DecodingBatch
from nest.generation.decoding import Choice
from nest.generation.sampling import Sampling
from nest.generation.static import decoded_batches, planned
from nest.progress import ProgressCallback


class LocalScorer:
    """Log-probabilities of first tokens, in batches of like lengths that run a common beginning once.

        LocalScorer(model, encoder).log_probs(conversations, ("Yes", "No"))   # (B, 2)

    A candidate's token is the one that it begins with as an answer, the template's blanks before it and
    all: `Yes` after a generation prompt may be another token than `Yes` alone.

    Args:
        model: transformers decoder, or any module.
        encoder: Of the model.
        batch_size: Most conversations in a batch.
        progress: Called as `progress("score", conversations done, conversations)`.

    Raises:
        InputError: a batch size below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoder,
        *,
        batch_size: int = 256,
        progress: ProgressCallback | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1")
        self._model, self._encoder = model, encoder
        self._batch_size, self._progress = batch_size, progress

    def log_probs(
        self, conversations: Sequence[Conversation], candidates: Sequence[str]
    ) -> Float[np.ndarray, "B C"]:
        """Log-probability of each candidate's first token as the next one said.

        Args:
            conversations: Each ends with a user turn, or has a prefill that the candidate goes on from.
            candidates: Texts that begin with different tokens.

        Raises:
            InputError: a conversation or a candidate that the encoder refuses, no candidates, or two that
                begin with the same token.
            ActivationError: logits that hold NaN.
        """
        if not candidates:
            raise InputError("there are no candidates to score; give at least one text")
        askers: dict[tuple[int, ...], list[int]] = {}
        for number, conversation in enumerate(conversations):
            askers.setdefault(tuple(self._encoder.prompt(conversation)), []).append(number)
        prompts = list(askers)
        tokens = self._first_tokens(conversations, candidates)  # (conversations, C)
        sought = [tokens[numbers[0]] for numbers in askers.values()]
        found = np.empty((len(conversations), len(candidates)))
        n_done = 0
        for batch, scores in self._scored(prompts, sought):
            for prompt, row in zip(batch.indices, scores, strict=True):
                numbers = askers[prompts[prompt]]
                found[numbers] = row
                n_done += len(numbers)
            if self._progress is not None:
                self._progress("score", n_done, len(conversations))
        return found

    def _scored(
        self, prompts: Sequence[Sequence[int]], sought: Sequence[Sequence[int]]
    ) -> Iterator[tuple[DecodingBatch, np.ndarray]]:
        """Every batch with the log-probabilities of its prompts' candidates."""
        only_first = Sampling(max_new_tokens=1)
        batches = planned(self._model, self._encoder, prompts, only_first, self._batch_size)
        scores: dict[int, np.ndarray] = {}

        def choice_of(batch: DecodingBatch) -> Choice:
            def record(
                logits: Float[Tensor, "B V"], rows: Sequence[int], step: int
            ) -> Int[Tensor, " B"]:
                own = torch.tensor([sought[index] for index in batch.indices], device=logits.device)
                wide = logits if logits.dtype == torch.float64 else logits.float()
                found = wide.gather(1, own) - wide.logsumexp(1, keepdim=True)  # (B, C)
                scores[batch.indices[0]] = found.double().cpu().numpy()
                return logits.argmax(-1)

            return record

        for batch, _ in decoded_batches(self._model, self._encoder, prompts, batches, choice_of):
            found = scores.pop(batch.indices[0])
            if np.isnan(found).any():
                raise ActivationError(
                    "the model's logits hold NaN, and no answer can be scored; check its weights, or load "
                    "it in another dtype (bfloat16 or float32 in place of float16)"
                )
            yield batch, found

    def _first_tokens(
        self, conversations: Sequence[Conversation], candidates: Sequence[str]
    ) -> list[list[int]]:
        """The tokens that the candidates begin with after each conversation.

        What a template writes before an answer is the same in all conversations but for the prefill.
        """
        known: dict[str, list[int]] = {}
        for conversation in conversations:
            if conversation.prefill not in known:
                tokens = [self._first_token(conversation, text) for text in candidates]
                _require_different(candidates, tokens)
                known[conversation.prefill] = tokens
        return [known[conversation.prefill] for conversation in conversations]

    def _first_token(self, conversation: Conversation, candidate: str) -> int:
        response = conversation.prefill + candidate
        ids, n_prompt = self._encoder.dialogue(conversation, response)
        return ids[n_prompt]


def _require_different(candidates: Sequence[str], tokens: Sequence[int]) -> None:
    pairs = combinations(zip(candidates, tokens, strict=True), 2)
    for (first, token), (second, other) in pairs:
        if token == other:
            raise InputError(
                f"the candidates {first!r} and {second!r} begin with the same token ({token}), and only "
                "first tokens are scored; choose words that part at once (or, where the template opens a "
                "thought before every answer, switch thinking off)"
            )
