"""Near-duplicates between two sets: prompts of one that the other has already, in nearly the same words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nest.errors import InputError
from nest.prompts.prompt_set import PromptSet

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy.sparse import csr_array

BLOCK_ROWS = 256
"""Prompts of the second set compared at once: against 50,000, all of which share a word with all of them,
a block's counts and similarities take 300 MB."""

MAX_EXAMPLES = 3


@dataclass(frozen=True)
class Pair:
    """Two prompts that are nearly the same.

    Attributes:
        first: The text in the first set.
        second: The text in the second set.
        jaccard: Content words that both have, as a share of those that either has, in [0, 1].
    """

    first: str
    second: str
    jaccard: float


@dataclass(frozen=True)
class Overlap:
    """How much of a set another one has already.

    Attributes:
        first: Name of the set that is searched.
        second: Name of the set that is looked up in it.
        at_least: The Jaccard similarity from which on two prompts are near-duplicates.
        n: Prompts of `second` that have a near-duplicate in `first`.
        of: Prompts of `second`.
        examples: The first few of them, each with its nearest prompt of `first`.
    """

    first: str
    second: str
    at_least: float
    n: int
    of: int
    examples: tuple[Pair, ...]


def near_duplicates(first: PromptSet, second: PromptSet, *, at_least: float = 0.8) -> Overlap:
    """How many prompts of `second` have a near-duplicate in `first`.

    Compared are the sets of content words (English stop words left out, case ignored), by Jaccard
    similarity: |A and B| / |A or B|. A prompt without any content word duplicates only an equal text.

    Args:
        first: What is searched.
        second: What is looked up in it.
        at_least: Similarity from which on two prompts count as near-duplicates, in (0, 1].

    Raises:
        InputError: `at_least` lies outside (0, 1].
    """
    if not 0 < at_least <= 1:
        raise InputError(f"at_least is {at_least!r}; expected a similarity in (0, 1]")
    nearest = _nearest(first.prompts, second.prompts)
    found = [
        Pair(first.prompts[there], text, jaccard)
        for text, (there, jaccard) in zip(second.prompts, nearest, strict=True)
        if jaccard >= at_least
    ]
    return Overlap(
        first.name, second.name, at_least, len(found), len(second), tuple(found[:MAX_EXAMPLES])
    )


def _nearest(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, float]]:
    """For each text of `second` where in `first` its nearest text stands, and how near it is."""
    there, here = _content_words(first, second)
    sizes = np.diff(there.indptr)  # (A,)
    found: list[tuple[int, float]] = []
    for start in range(0, len(second), BLOCK_ROWS):
        found += _nearest_rows(here[start : start + BLOCK_ROWS], there, sizes)
    equal = {text: row for row, text in reversed(list(enumerate(first)))}
    for row in np.flatnonzero(np.diff(here.indptr) == 0).tolist():
        text = second[row]
        found[row] = (equal.get(text, 0), float(text in equal))
    return found


def _content_words(first: Sequence[str], second: Sequence[str]) -> tuple[csr_array, csr_array]:
    """Which words each text has: (A, V) and (B, V), ones where it has them."""
    from scipy.sparse import csr_array
    from sklearn.feature_extraction.text import CountVectorizer

    words_of = CountVectorizer(stop_words="english").build_analyzer()
    known = {word for text in (*first, *second) for word in words_of(text)}
    # of no use to texts that have no word at all, but a vocabulary may not be empty
    vocabulary = sorted(known) or [""]
    counter = CountVectorizer(
        binary=True, stop_words="english", vocabulary=vocabulary, dtype=np.int32
    )
    return csr_array(counter.transform(first)), csr_array(counter.transform(second))


def _nearest_rows(
    here: csr_array, there: csr_array, sizes: NDArray[np.int32]
) -> list[tuple[int, float]]:
    """For each row of `here` the first of the rows of `there` that is nearest, and how near it is."""
    both = (here @ there.T).tocsr()  # (B, A)
    found = []
    for row, size in enumerate(np.diff(here.indptr)):
        part = slice(both.indptr[row], both.indptr[row + 1])
        shared, columns = both.data[part], both.indices[part]
        if not len(shared):
            found.append((0, 0.0))
            continue
        jaccard = shared / (size + sizes[columns] - shared)
        most = jaccard.max()
        found.append((int(columns[jaccard == most].min()), float(most)))
    return found
