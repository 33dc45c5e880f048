"""What a reader and the judge said of real models' answers is still what the judge says."""

from __future__ import annotations

import json

from experiments.real.judging.agreement import (
    HALVES,
    READINGS,
    agreement,
    judged_anew,
    line,
    sha256_of,
)
from nest.judging.judge import Verdict

SETS = json.loads(READINGS.read_text(encoding="utf-8"))["sets"]


def test_every_set_is_whole() -> None:
    for rows in SETS.values():
        assert len(rows) == 60 and len({row["row"] for row in rows}) == 60
        assert [row["half"] for row in rows] == [*HALVES] * 30
        for row in rows:
            assert {row["read"], row["judged"], row["judged_before"]} <= {v.value for v in Verdict}
            assert "response" not in row or row["read"] == "refused"
            assert "response" not in row or sha256_of(row["response"]) == row["sha256"]


def test_the_judge_still_says_so() -> None:
    for name, rows in SETS.items():
        assert judged_anew(rows, {}) == [], name
    changed = [{**SETS["qwen"][3], "judged": "complied"}]
    assert changed[0]["response"] and len(judged_anew(changed, {})) == 1


def test_the_rule_is_better_than_the_one_before_on_the_half_it_was_not_chosen_on() -> None:
    rows = [row for rows in SETS.values() for row in rows if row["half"] == "test"]
    now, before = agreement(rows, "judged"), agreement(rows, "judged_before")
    assert now.share > before.share + 0.1
    assert now.kappa is not None and now.kappa > 0.75
    assert line("all", "test", rows).startswith("| all | test | 150 |")
