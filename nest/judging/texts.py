"""What can be said of a response by its text alone."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

from nest.conversations.thoughts import strip_thinking

_QUOTES = str.maketrans({"‘": "'", "’": "'", "ʼ": "'", "`": "'", "“": '"', "”": '"'})

LOOP_CHARACTERS = 80
"""A loop is at least so long."""

LOOP_TIMES = 2.5
"""A loop says its block so many times at least; the last may break off."""

LOOKED_AT_CHARACTERS = 20_000
"""So many of an answer's last characters are searched for repetition."""

# How a line of a list begins: a bullet, or a number or letter with a stop or bracket.
LIST_ITEM = re.compile(r"^\s*(?:[-*•–·]|\(?(?:\d{1,2}|[a-z])[.)]|#+ *\d{1,2}[.)]?)\s+(?=\S)")


def exact_match(response: str, reference: str) -> bool:
    """Whether both answers are the same but for whitespace and reasoning."""
    return strip_thinking(response).split() == strip_thinking(reference).split()


def is_degenerate(response: str) -> bool:
    """Whether the answer is empty, mostly one repetition, or ends in a loop.

    Repetition means that one sequence of one to three words makes up more than half of at least eight
    words, or one of one to three characters more than half of at least sixteen. A loop is a block of any
    length that is said two and a half times or more, up to the answer's end, and that makes up more than
    half of it; numbers of a list don't count. Of very long answers the end is looked at.
    """
    answer = strip_thinking(response)[-LOOKED_AT_CHARACTERS:]
    if not answer:
        return True
    plain = re.sub(r"\s+", " ", answer)
    return _is_repetition(answer.split(), 8) or _is_repetition(plain, 16) or _ends_in_a_loop(answer)


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


def _ends_in_a_loop(answer: str) -> bool:
    """Whether some suffix of more than half of the text has a period that it holds 2.5 times.

    Read backwards, a suffix is a prefix, and the smallest period of a prefix is its length less that of
    its longest border (Knuth, Morris and Pratt's failure function).
    """
    lines = (LIST_ITEM.sub("", line) for line in answer.splitlines())
    text = re.sub(r"\s+", " ", " ".join(lines))[::-1]
    border, borders = 0, [0]
    for place in range(1, len(text)):
        while border and text[place] != text[border]:
            border = borders[border - 1]
        border += text[place] == text[border]
        borders.append(border)
        length = place + 1
        if length >= LOOP_CHARACTERS and 2 * length > len(text):
            period = length - border
            if length >= LOOP_TIMES * period:
                return True
    return False


def folded(text: str) -> str:
    """Text for the search of phrases: one form of each character, straight quotes, one case, one space.

    Compatibility forms (full-width letters, ligatures) become ordinary ones, and what has no width, such
    as a soft hyphen, goes.
    """
    plain = unicodedata.normalize("NFKC", text).translate(_QUOTES).casefold()
    # a dotted capital I is folded to an i and the dot above it
    plain = unicodedata.normalize("NFC", plain).replace("i\u0307", "i")
    seen = (c for c in plain if unicodedata.category(c) != "Cf")
    return re.sub(r"\s+", " ", "".join(seen)).strip()


def says(text: str, phrases: Sequence[str]) -> bool:
    """Whether one of the phrases stands in a folded text, at the beginning of a word.

    In scripts that put words together or without spaces, anywhere.
    """
    return any(_begins_a_word(text, phrase) for phrase in phrases if phrase in text)


def _begins_a_word(text: str, phrase: str) -> bool:
    if not _has_spaced_words(phrase[:1]):
        return True
    found = text.find(phrase)
    while found >= 0:
        if found == 0 or not text[found - 1].isalnum():
            return True
        found = text.find(phrase, found + 1)
    return False


def _has_spaced_words(character: str) -> bool:
    """Latin, Greek or Cyrillic."""
    return character.isalpha() and character < "\u0530"


def width(character: str) -> int:
    """2 for the wide characters of East Asia, of which one says what two letters or more do; else 1."""
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def beginning(text: str, columns: int) -> str:
    """So much of a text's beginning, wide characters counted twice."""
    for place, character in enumerate(text):
        columns -= width(character)
        if columns < 0:
            return text[:place]
    return text


def n_words(text: str) -> int:
    """Words between spaces; of scripts without spaces, every two wide characters are one."""
    n_wide = sum(width(character) == 2 for character in text)
    return len(text.split()) + n_wide // 2


def sentences(line: str) -> Iterator[str]:
    """The sentences of one folded line, without what is empty."""
    for piece in re.split(r"(?<=[.!?…؟।])\s+|(?<=[。!?])(?=[^\x00-\x7f])", line):
        if piece.strip():
            yield piece.strip()
