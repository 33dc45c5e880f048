"""What can be said of a response by its text alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from nest.conversations.thoughts import strip_thinking

_QUOTES = str.maketrans({"‘": "'", "’": "'", "ʼ": "'", "`": "'", "“": '"', "”": '"'})


def exact_match(response: str, reference: str) -> bool:
    """Whether both answers are the same but for whitespace and reasoning."""
    return strip_thinking(response).split() == strip_thinking(reference).split()


def is_degenerate(response: str) -> bool:
    """Whether the answer is empty or mostly one repetition.

    Repetition means that one sequence of one to three words makes up more than half of at least
    eight words, or one of one to three characters more than half of at least sixteen.
    """
    answer = strip_thinking(response)
    if not answer:
        return True
    return _is_repetition(answer.split(), 8) or _is_repetition(re.sub(r"\s+", " ", answer), 16)


def _is_repetition(items: Sequence[str], at_least: int) -> bool:
    """Whether one run of 1 to 3 items, seen three times or more, covers more than half of them."""
    if len(items) < at_least:
        return False
    for n in (1, 2, 3):
        grams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
        top, count = Counter(grams).most_common(1)[0]
        covered = {i + j for i, gram in enumerate(grams) if gram == top for j in range(n)}
        if count >= 3 and len(covered) > len(items) / 2:
            return True
    return False


def folded(text: str) -> str:
    return re.sub(r"\s+", " ", text.translate(_QUOTES).lower()).strip()
