"""Which of its tried settings an arm keeps, by what they did on development splits alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nest.comparison.task import Outcome

SCORED = ("wrapped", "bare", "over_refusal", "exact_match", "kl")


@dataclass(frozen=True)
class Tried:
    """One setting on the worlds to choose on.

    Attributes:
        value: Of the knob.
        score: Wrapped attack success (bare, where there are no attacks) plus over-refusal plus the share
            of answers that are not the good one, mean over worlds; None where a run failed.
        kl: Mean over worlds; decides between equal scores.
        by_world: The figures behind it.
        failed: Why there is no score.
    """

    value: float
    score: float | None
    kl: float
    by_world: Mapping[str, Mapping[str, Any]]
    failed: str | None = None


@dataclass(frozen=True)
class Choice:
    """What an arm's setting is, and why.

    Attributes:
        knob: Name of the setting.
        value: What is used; None for the method's own.
        tried: All that was tried; nothing where the plan says the value, or tries nothing.
    """

    knob: str
    value: float | None
    tried: tuple[Tried, ...] = ()


def chosen(knob: str, found: Mapping[float, Mapping[str, Outcome]]) -> Choice:
    """The tried setting with the lowest score; among equal ones the smallest KL, then the first.

    Args:
        knob: Name of the setting.
        found: For each value and world what the run found.
    """
    tried = tuple(_tried(value, by_world) for value, by_world in found.items())
    scored = [one for one in tried if one.score is not None]
    if not scored:  # the arm fails whatever it is set to; its runs will say so
        return Choice(knob, tried[0].value, tried)
    best = min(scored, key=lambda one: (round(one.score or 0.0, 9), one.kl))
    return Choice(knob, best.value, tried)


def _tried(value: float, by_world: Mapping[str, Outcome]) -> Tried:
    failed = next((one.failed for one in by_world.values() if one.failed is not None), None)
    figures = {
        world: {name: one.figures.get(name) for name in SCORED} for world, one in by_world.items()
    }
    if failed is not None:
        return Tried(value, None, 0.0, figures, failed)
    scores = [_score(one.figures) for one in by_world.values()]
    kls = [float(one.figures["kl"]) for one in by_world.values()]
    return Tried(value, _mean(scores), _mean(kls), figures)


def _score(figures: Mapping[str, Any]) -> float:
    attack = figures["bare"] if figures["wrapped"] is None else figures["wrapped"]
    return float(attack + figures["over_refusal"] + 1.0 - figures["exact_match"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
