"""Drawing tokens from logits, by chance that depends on the answer and not on who else is in its batch.

Every token takes one number of a stream of its answer's own, and the inverse of the distribution function
in the order of the vocabulary: where batches of other shapes round the logits otherwise, the function moves
by as little, and the token stays unless the number lies in that gap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nest.errors import ActivationError
from nest.generation.sampling import Sampling

BLOCK_TOKENS = 256
"""Probabilities are summed by blocks of so many tokens, and one block token by token."""

NUCLEUS_TOKENS = (256, 4096)
"""So many of the likeliest tokens are looked at first where `top_p` asks for an order, and all only for
rows in which these do not reach it: of a vocabulary of 152 thousand, finding them takes a 30th and a 5th of
the time of sorting."""

LEAST_TEMPERATURE = 1e-30
"""Lower ones would be 0 in fp32; already at this one all but the likeliest token have no chance."""


def chances(
    seed: int, prompt: Sequence[int], sample: int, n_tokens: int
) -> Float[np.ndarray, " T"]:
    """Numbers in [0, 1), one a token of an answer.

    They are the words of a counter-based generator (Philox) whose key is a hash of the arguments but the
    last: of more tokens the first numbers are the same.

    Args:
        seed: Of the sampling.
        prompt: Token ids that the answer follows.
        sample: Which of the answers to it.
        n_tokens: How many.
    """
    named = f"{seed} {sample} ".encode() + np.array(prompt, dtype="<i8").tobytes()
    key = int.from_bytes(hashlib.blake2b(named, digest_size=16).digest(), "little")
    # the raw words and not random(): numpy keeps them the same in every version
    words = np.random.Philox(key=key).random_raw(n_tokens)
    numbers: np.ndarray = (words >> np.uint64(11)) * 2.0**-53
    return numbers


def drawn(
    logits: Float[Tensor, "B V"], chance: Float[Tensor, " B"], sampling: Sampling
) -> Int[Tensor, " B"]:
    """One token a row: the first in the vocabulary's order at which the probabilities' sum exceeds chance.

    Of all tokens the `top_k` likeliest are kept, then the fewest of those whose share reaches `top_p`; of
    equally likely ones those that come first in the vocabulary.

    Args:
        logits: Of the next token, in any floating type.
        chance: In [0, 1), float64.
        sampling: Temperature (not 0), `top_k` and `top_p`.

    Raises:
        ActivationError: a row with NaN, or without a finite largest logit.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    # first the difference: it is exact near the largest, where a low temperature would magnify an error
    scores = (wide - wide.amax(1, keepdim=True)) / max(sampling.temperature, LEAST_TEMPERATURE)
    if sampling.top_k == 0 and sampling.top_p == 1:
        return _drawn_of_all(scores.exp(), chance)
    return _drawn_of_likeliest(scores, chance, sampling)


def _drawn_of_likeliest(
    scores: Float[Tensor, "B V"], chance: Float[Tensor, " B"], sampling: Sampling
) -> Int[Tensor, " B"]:
    """As `drawn`, where the tokens that are kept have to be found."""
    n_vocabulary = scores.shape[1]
    sizes = [min(sampling.top_k, n_vocabulary)]
    if sampling.top_k == 0:
        total = _checked(scores.exp().sum(1, keepdim=True).double())  # (B, 1)
        sizes = [*(size for size in NUCLEUS_TOKENS if 8 * size < n_vocabulary), n_vocabulary]
    tokens = torch.empty_like(chance, dtype=torch.int64)
    rows = torch.arange(len(scores), device=scores.device)
    for size in sizes:
        values, ids = _likeliest(scores[rows], size)  # (rows, size)
        weights = values.double().exp()
        sums = weights.cumsum(1)
        enough = sampling.top_p * (_checked(sums[:, -1:]) if sampling.top_k else total[rows])
        weights = weights.masked_fill(sums - weights >= enough, 0)
        tokens[rows] = _in_order(weights, ids, chance[rows], n_vocabulary)
        rows = rows[sums[:, -1] < enough.squeeze(1)]
        if len(rows) == 0:
            break
    return tokens


def _in_order(
    weights: Float[Tensor, "B K"], ids: Int[Tensor, "B K"], chance: Float[Tensor, " B"], n: int
) -> Int[Tensor, " B"]:
    """The token at which the weights' sum, in the order of a vocabulary of n tokens, exceeds chance."""
    if ids.shape[1] == n:
        return _first_beyond(weights.scatter(1, ids, weights), chance).squeeze(1)
    ids, order = ids.sort(dim=1)
    return ids.gather(1, _first_beyond(weights.gather(1, order), chance)).squeeze(1)


def _likeliest(scores: Float[Tensor, "B V"], n: int) -> tuple[Tensor, Tensor]:
    """(scores, token ids) of the n likeliest tokens, falling; of equal ones the first in the vocabulary.

    `topk` takes any of equal ones: in bf16 the last of the n likeliest is often one of several. So some
    more are taken, and where even those are equal, all are sorted.
    """
    taken = 2 * n + 64
    if 4 * taken < scores.shape[1]:
        values, ids = scores.topk(taken, dim=1)
        if bool((values[:, -1] < values[:, n - 1]).all()):
            ids, order = ids.sort(dim=1)
            values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
            return values[:, :n], ids.gather(1, order)[:, :n]
    values, ids = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :n], ids[:, :n]


def _drawn_of_all(weights: Float[Tensor, "B V"], chance: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """As `drawn`, from all tokens: first the block, then the token in it, summed in float64."""
    n_vocabulary = weights.shape[1]
    whole = n_vocabulary // BLOCK_TOKENS * BLOCK_TOKENS
    blocks = weights[:, :whole].unflatten(1, (-1, BLOCK_TOKENS)).sum(2)  # (B, blocks)
    rest = weights[:, whole:].sum(1, keepdim=True)
    sums = torch.cat([blocks, rest], dim=1).double()
    total = _checked(sums.sum(1, keepdim=True))
    block = _first_beyond(sums, chance)  # (B, 1)
    before = (sums.cumsum(1) - sums).gather(1, block)
    # where in its block, as a share of it, the number lies; rounding may put it a little outside
    share = ((chance[:, None] * total - before) / sums.gather(1, block)).clamp(0, 1).squeeze(1)
    columns = block * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=n_vocabulary - 1)).double()
    place = _first_beyond(inside.masked_fill(columns >= n_vocabulary, 0), share)
    return (block * BLOCK_TOKENS + place).squeeze(1)


def _first_beyond(weights: Float[Tensor, "B K"], share: Float[Tensor, " B"]) -> Int[Tensor, "B 1"]:
    """The first place up to which the weights' sum exceeds this share of them all; it has a weight."""
    sums = weights.cumsum(1)
    total = sums[:, -1:]
    # a share near 1 may round up to the whole, which no sum exceeds
    most = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(sums, torch.minimum(share[:, None] * total, most), right=True)


def _checked(total: Tensor) -> Tensor:
    """Sums of probabilities that are numbers.

    Raises:
        ActivationError: one is none.
    """
    if not bool(torch.isfinite(total).all()):
        raise ActivationError(
            "the model's logits hold NaN or infinity, and no token can be drawn from them; check its "
            "weights, or load it in another dtype (bfloat16 or float32 in place of float16)"
        )
    return total
