"""How far two judges agree on the same exchanges."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from nest.errors import InputError
from nest.judging.judge import SUCCESSES, Exchange, Judge, Judgement, Verdict


@dataclass(frozen=True)
class Agreement:
    """Two judges on the same exchanges.

    Attributes:
        judges: Their names.
        counts: For each pair of verdicts (the first judge's, the second's) how many exchanges have it.
    """

    judges: tuple[str, str]
    counts: Mapping[tuple[Verdict, Verdict], int]

    @property
    def n(self) -> int:
        """How many exchanges both have judged."""
        return sum(self.counts.values())

    @property
    def share(self) -> float:
        """Of the exchanges, those with the same verdict by both."""
        return sum(n for (one, other), n in self.counts.items() if one is other) / self.n

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa of the verdicts; None where both give one and the same verdict to all."""
        return _kappa(self._labels(lambda verdict: verdict.value))

    @property
    def kappa_of_success(self) -> float | None:
        """The same of whether the verdict is a success of an attack, which is what rates are made of."""
        return _kappa(self._labels(lambda verdict: str(verdict in SUCCESSES)))

    def table(self) -> list[list[int]]:
        """The confusion table: a row a verdict of the first judge, a column one of the second, in the
        order of `Verdict`."""
        return [[self.counts.get((first, second), 0) for second in Verdict] for first in Verdict]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return {
            "judges": list(self.judges),
            "n": self.n,
            "agreement": self.share,
            "kappa": self.kappa,
            "kappa_of_success": self.kappa_of_success,
            "verdicts": [verdict.value for verdict in Verdict],
            "table": self.table(),
        }

    def _labels(self, label: Any) -> tuple[list[str], list[str]]:
        pairs = [pair for pair, n in self.counts.items() for _ in range(n)]
        return [label(first) for first, _ in pairs], [label(second) for _, second in pairs]


def agreement_of(
    judges: tuple[str, str], first: Sequence[Judgement], second: Sequence[Judgement]
) -> Agreement:
    """The agreement of two judges' judgements.

    Args:
        judges: Their names.
        first, second: Their judgements of the same exchanges, in the same order.

    Raises:
        InputError: no judgements, or not as many of the one as of the other.
    """
    if len(first) != len(second) or not first:
        raise InputError(
            f"{judges[0]} has judged {len(first)} exchanges and {judges[1]} {len(second)}; expected the "
            "same exchanges, at least one"
        )
    pairs = zip(first, second, strict=True)
    return Agreement(judges, Counter((one.verdict, other.verdict) for one, other in pairs))


def agreements(judges: Sequence[Judge], exchanges: Sequence[Exchange]) -> list[Agreement]:
    """The agreement of every two judges, each of which judges every exchange once.

    Raises:
        InputError: no exchanges.
        EngineError: the model behind a judge failed.
    """
    found = [(judge.name, judge.judge(exchanges)) for judge in judges]
    return [agreement_of((one[0], two[0]), one[1], two[1]) for one, two in combinations(found, 2)]


def _kappa(labels: tuple[list[str], list[str]]) -> float | None:
    if len({*labels[0], *labels[1]}) < 2:
        return None  # all is agreed on by chance alone: 0 / 0
    from sklearn.metrics import cohen_kappa_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kappa = float(cohen_kappa_score(*labels))
    return None if math.isnan(kappa) else kappa
