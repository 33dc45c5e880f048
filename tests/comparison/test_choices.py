"""An arm keeps the setting with the lowest score on development."""

from __future__ import annotations

from typing import Any

from nest.comparison.choices import chosen
from nest.comparison.task import Outcome


def found(wrapped: float | None, **others: float) -> Outcome:
    figures: dict[str, Any] = {"bare": 0.5, "over_refusal": 0.0, "exact_match": 1.0, "kl": 0.1}
    return Outcome({**figures, "wrapped": wrapped, **others})


def test_the_lowest_mean_over_worlds() -> None:
    choice = chosen(
        "learning_rate",
        {
            1e-3: {"one": found(0.2), "two": found(0.2)},
            1e-2: {"one": found(0.0), "two": found(0.3)},
        },
    )
    assert choice.value == 1e-2 and [round(one.score or 0, 9) for one in choice.tried] == [
        0.2,
        0.15,
    ]


def test_over_refusal_and_lost_answers_count() -> None:
    broken = {1.0: {"one": found(0.0, exact_match=0.2)}, 2.0: {"one": found(0.5)}}
    assert chosen("strength", broken).value == 2.0
    refusing = {1.0: {"one": found(0.0, over_refusal=0.9)}, 2.0: {"one": found(0.5)}}
    assert chosen("strength", refusing).value == 2.0


def test_between_equals_the_smaller_drift() -> None:
    equal = {1.0: {"one": found(0.1, kl=0.5)}, 2.0: {"one": found(0.1, kl=0.2)}}
    assert chosen("strength", equal).value == 2.0


def test_bare_prompts_where_there_are_no_attacks() -> None:
    bare = {1.0: {"one": found(None, bare=0.4)}, 2.0: {"one": found(None, bare=0.1)}}
    assert chosen("strength", bare).value == 2.0


def test_a_setting_that_fails_is_not_kept() -> None:
    failing = {1.0: {"one": Outcome(failed="E: no")}, 2.0: {"one": found(0.9)}}
    choice = chosen("strength", failing)
    assert choice.value == 2.0 and choice.tried[0].failed == "E: no"
    assert chosen("strength", {1.0: {"one": Outcome(failed="E: no")}}).value == 1.0
