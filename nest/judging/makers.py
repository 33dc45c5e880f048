"""Judges by name."""

from __future__ import annotations

from pathlib import Path

from nest.errors import InputError
from nest.judging.judge import Judge
from nest.judging.phrases import phrase_judge
from nest.judging.reference import ReferenceJudge


def make_judges(names: str, refusal_phrases: str | Path | None = None) -> tuple[Judge, ...]:
    """Judges by their names, with commas between; the first one is the one that counts.

    Raises:
        InputError: see `make_judge`.
    """
    return tuple(make_judge(name.strip(), refusal_phrases) for name in names.split(","))


def make_judge(name: str, refusal_phrases: str | Path | None = None) -> Judge:
    """The judge of a name.

    Args:
        name: `phrases` or `reference`.
        refusal_phrases: Text file with one more refusal phrase a line, blank lines left out.

    Raises:
        InputError: an unknown name, or a phrase file that cannot be used.
    """
    phrases = phrase_judge(refusal_phrases)
    if name == "phrases":
        return phrases
    if name == "reference":
        return ReferenceJudge(phrases)
    raise InputError(f"unknown judge {name!r}; the known ones are phrases, reference")
