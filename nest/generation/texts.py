"""Answers as text: how they go on from a prefill, and where a stop text ends them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from nest.conversations.encoders import Encoder

ANCHOR_TOKENS = 32
"""So many of a prompt's last tokens are decoded with the answer that goes on from its prefill."""


def continuation(
    encoder: Encoder, prompt: Sequence[int], prefill: str, token_ids: Sequence[int]
) -> str:
    """What tokens say; after a prefill, with the white space that stands between the two.

    A tokenizer's decoder drops the blank at the beginning of a text, and an encoder's `decode` opens the
    thought that the prompt has opened, which a prefill has closed. So what goes on from a prefill is
    decoded together with the end of its prompt, and that is taken off again.

    Args:
        encoder: Of the model.
        prompt: The prompt's token ids, those of the prefill at their end.
        prefill: How the answer begins; empty where it does not.
        token_ids: What the model said, without the token that ends it.
    """
    if not prefill:
        return encoder.decode(token_ids)
    ends = [place for place, token in enumerate(prompt) if token in encoder.eos_ids]
    first = max(ends[-1] + 1 if ends else 0, len(prompt) - ANCHOR_TOKENS)
    before = encoder.decode(prompt[first:])
    whole = encoder.decode([*prompt[first:], *token_ids])
    if not whole.startswith(before):
        return encoder.decode(token_ids)
    said = whole[len(before) :]
    # a template may have cut the blanks off the prefill, and then the model says them
    blanks = prefill[len(prefill.rstrip()) :]
    return said.removeprefix(blanks) if said.startswith(blanks) else said.lstrip()


def before_stop(text: str, stop: Sequence[str]) -> str | None:
    """A text up to the first of the stop texts, without the white space before that; None without any."""
    places = [place for place in (text.find(one) for one in stop) if place >= 0]
    return text[: min(places)].rstrip() if places else None


def cut_at_stop(
    encoder: Encoder,
    prompt: Sequence[int],
    prefill: str,
    token_ids: Sequence[int],
    stop: Sequence[str],
) -> tuple[str, list[int], bool]:
    """(continuation, tokens, whether it was cut) of an answer up to the first stop text.

    The tokens are the fewest that hold a stop text, so that they do not depend on how far an engine went
    on before it noticed.
    """

    def said(n_tokens: int) -> str:
        return continuation(encoder, prompt, prefill, token_ids[:n_tokens])

    whole = said(len(token_ids))
    kept = before_stop(whole, stop)
    if kept is None:
        return whole, list(token_ids), False
    fewest = bisect_left(
        range(len(token_ids)), True, key=lambda n: before_stop(said(n), stop) is not None
    )
    earlier = before_stop(said(fewest), stop)
    if earlier is None:  # a decoder that takes back what it said
        return kept, list(token_ids), True
    return earlier, list(token_ids[:fewest]), True
