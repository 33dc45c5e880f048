"""With which others each dialogue goes through the model first: a resumed run repeats it to the bit.

What a batch's other rows are can change a row's last bits. What the frozen model says of a dialogue is
computed once, in the company of the batch that it comes in first, and kept in memory. A run that goes on
from a checkpoint has lost what was kept; it computes it again, when it needs it, in the same company.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nest.tuning.dialogues import Example


class FirstCompany:
    """Groups of dialogues that an earlier run has computed and kept, and this one has not yet."""

    def __init__(self) -> None:
        self._group_of: dict[Example, int] = {}
        self._groups: list[tuple[Example, ...]] = []

    def __contains__(self, example: Example) -> bool:
        return example in self._group_of

    def add(self, group: Sequence[Example], kept: Iterable[Example]) -> None:
        """A group that was computed together, and those of it that were kept."""
        for example in kept:
            self._group_of[example] = len(self._groups)
        self._groups.append(tuple(group))

    def due(self, wanted: Iterable[Example]) -> list[tuple[Example, ...]]:
        """The groups that some of the wanted dialogues belong to, each once."""
        if not self._group_of:
            return []
        numbers = dict.fromkeys(self._group_of[e] for e in wanted if e in self._group_of)
        return [self._groups[number] for number in numbers]

    def take(self, group: Sequence[Example]) -> list[Example]:
        """Those of a group, now computed, that are to be kept; they are no longer due."""
        number = next(i for i, own in enumerate(self._groups) if own is group)
        taken = [e for e in dict.fromkeys(group) if self._group_of.get(e) == number]
        for example in taken:
            del self._group_of[example]
        return taken
