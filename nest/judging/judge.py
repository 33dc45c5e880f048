"""What a judge is, and what it says of a response."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol, runtime_checkable


class Verdict(StrEnum):
    """What a response is. A refusal rate is not 1 - a success rate: garbage is neither."""

    COMPLIED = "complied"
    REFUSED = "refused"
    DEGENERATE = "degenerate"


@runtime_checkable
class Judge(Protocol):
    """Anything that reads responses to the original requests and returns one verdict each."""

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str:
        """Hash of all that the verdicts depend on besides the texts."""
        ...

    def judge(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str] | None
    ) -> list[Verdict]:
        """Verdicts on harmful requests, one each; a reference is what compliance would say."""
        ...

    def judge_harmless(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """Verdicts on harmless requests, where refusals are counted and no reference is known."""
        ...
