"""Which prompts are decoded together: like lengths, and a beginning in common where there is one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from nest.errors import InputError

TOKENS_PER_BATCH = 65_536
"""Most prompt tokens in a batch, so that long prompts get smaller batches."""

HELD_TOKENS = 4 * TOKENS_PER_BATCH
"""Most prompt tokens whose keys and values a batch holds: several answers to one prompt each hold all of
its tokens, though they are run once. On Llama 3.1 8B they come to 34 GB."""


class DecodingBatch(NamedTuple):
    """Prompts to be decoded together.

    Attributes:
        indices: Which prompts, the longest first.
        n_shared: How many of their first tokens are the same in all of them; less than the shortest
            of them has.
        max_new_tokens: How many tokens an answer may have.
        samples: Which of the answers to each prompt.
    """

    indices: list[int]
    n_shared: int
    max_new_tokens: int
    samples: range = range(1)


def plan_batches(
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | None,
    max_new_tokens: int,
    batch_size: int,
    may_pad: bool,
    batch_cost_tokens: int,
    n_samples: int = 1,
) -> list[DecodingBatch]:
    """Every answer to every prompt in one batch, long prompts first.

    Prompts with a long beginning in common (an attack's text, a system prompt) make a family, whose
    beginning is run once. A family is sorted by length and cut into batches. Prompts so near the end
    of the context that their answers must be shorter keep to batches of their own length. All answers
    to a prompt are in one batch, where it is run once; if they are too many, a few batches are theirs
    alone.

    Args:
        prompts: Token ids, none twice.
        max_tokens: The model's context.
        max_new_tokens: Tokens of an answer that the context does not cut short.
        batch_size: Most answers in a batch.
        may_pad: Whether different lengths may share a batch.
        batch_cost_tokens: How many prompt tokens run in the time that one more batch costs: less is
            neither shared nor padded for.
        n_samples: Answers to each prompt.

    Raises:
        InputError: a prompt that fills the context.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    free: list[int] = []
    for index, prompt in enumerate(prompts):
        if max_tokens is not None and len(prompt) >= max_tokens:
            raise InputError(
                f"a prompt has {len(prompt)} tokens and the model's context {max_tokens}; shorten "
                "the prompt so that an answer fits"
            )
        if may_pad and (max_tokens is None or len(prompt) + max_new_tokens <= max_tokens):
            free.append(index)
        else:
            by_length[len(prompt)].append(index)
    batches: list[DecodingBatch] = []
    for length, indices in by_length.items():
        room = max_new_tokens if max_tokens is None else max_tokens - length
        size = _most_prompts(length, length, batch_size, n_samples)
        batches += [
            DecodingBatch(indices[i : i + size], 0, min(max_new_tokens, room))
            for i in range(0, len(indices), size)
        ]
    for n_shared, indices in families(prompts, free, batch_cost_tokens):
        indices.sort(key=lambda index: len(prompts[index]), reverse=True)
        lengths = [len(prompts[index]) for index in indices]
        for start, stop in _cuts(lengths, n_shared, batch_size, n_samples, batch_cost_tokens):
            shared = n_shared if stop - start > 1 else 0
            batches.append(DecodingBatch(indices[start:stop], shared, max_new_tokens))
    batches.sort(key=lambda batch: -len(prompts[batch.indices[0]]))
    return [
        batch._replace(samples=samples)
        for batch in batches
        for samples in _samples(len(prompts[batch.indices[0]]), batch_size, n_samples)
    ]


def families(
    prompts: Sequence[Sequence[int]], indices: Sequence[int], least_tokens: int
) -> list[tuple[int, list[int]]]:
    """(tokens in common, prompts) of every family; each of the prompts is in one.

    In the order of their tokens, prompts with a beginning in common are neighbours. A family stays
    apart from the larger one around it if that spares it so many tokens; otherwise it dissolves.

    Args:
        prompts: Token ids.
        indices: Those of the prompts that it is about.
        least_tokens: What a family has to spare.
    """
    kept: list[tuple[int, list[int]]] = []
    open_: list[tuple[int, list[int]]] = [(0, [])]  # the families around the current prompt

    def close(n_shared: int) -> None:
        """End the families that have more tokens in common than so many."""
        while open_[-1][0] > n_shared:
            depth, members = open_.pop()
            outer = max(open_[-1][0], n_shared)
            if open_[-1][0] < outer:
                open_.append((outer, []))
            if members and (len(members) - 1) * (depth - outer) >= least_tokens:
                kept.append((depth, members))
            else:
                open_[-1][1].extend(members)

    previous: Sequence[int] = ()
    for index in sorted(indices, key=lambda index: tuple(prompts[index])):
        prompt = prompts[index]
        # the last token is always run with its prompt: its logits are the answer's first token
        close(min(_n_common(previous, prompt), len(prompt) - 1))
        open_.append((len(prompt) - 1, [index]))
        previous = prompt
    close(0)
    return kept + [family for family in open_ if family[1]]


def _n_common(first: Sequence[int], second: Sequence[int]) -> int:
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))


def _cuts(
    lengths: Sequence[int], n_shared: int, batch_size: int, n_samples: int, most_padding: int
) -> list[tuple[int, int]]:
    """(start, stop) of batches of falling lengths: not too many rows, tokens or much padding."""
    cuts: list[tuple[int, int]] = []
    start = padding = 0
    for row, length in enumerate(lengths):
        longest = lengths[start]
        padding += longest - length
        full = row - start >= _most_prompts(longest - n_shared, longest, batch_size, n_samples)
        if row > start and (full or padding > most_padding):
            cuts.append((start, row))
            start, padding = row, 0
    return [*cuts, (start, len(lengths))]


def _most_prompts(n_run: int, n_held: int, batch_size: int, n_samples: int) -> int:
    """How many prompts of so many tokens, to be run and held, a batch takes with all their answers."""
    n_answers = min(batch_size, HELD_TOKENS // n_held)
    return max(1, min(TOKENS_PER_BATCH // n_run, n_answers // n_samples))


def _samples(n_held: int, batch_size: int, n_samples: int) -> list[range]:
    """All answers to a prompt at once, or as many as fit."""
    size = min(n_samples, max(1, min(batch_size, HELD_TOKENS // n_held)))
    return [range(i, min(i + size, n_samples)) for i in range(0, n_samples, size)]
