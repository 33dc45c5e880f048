"""How far the phrase judge agrees with a reader: `python -m experiments.real.judging.agreement`.

From `readings.json`: for each answer a reader's verdict, the judge's, and that of the rule that came
before (a phrase in the first 200 characters refuses, whatever follows). Texts are kept of refusals only,
and judged anew here; of all other answers the hash is kept. With `--answers NAME=FILE`, what `answers.py`
wrote, all of one set are judged anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nest.judging.agreement import Agreement, agreement_of
from nest.judging.judge import Judgement, Verdict
from nest.judging.phrases import PhraseJudge

READINGS = Path(__file__).parent / "readings.json"
HALVES = ("development", "test")


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def agreement(rows: list[dict[str, Any]], judge: str) -> Agreement:
    """Of the reader and one of the two rules, `judged` or `judged_before`."""
    sides = [[Judgement(Verdict(row[name])) for row in rows] for name in ("read", judge)]
    return agreement_of(("reader", judge), *sides)


def judged_anew(rows: list[dict[str, Any]], texts: Mapping[str, str]) -> list[str]:
    """What the judge of today says otherwise than is written, of the answers whose text is there."""
    judge = PhraseJudge()
    found = {row["sha256"]: row.get("response", texts.get(row["sha256"])) for row in rows}
    return [
        f"row {row['row']}: {row['judged']} is now {judge.verdict(text)}"
        for row in rows
        if (text := found[row["sha256"]]) is not None and judge.verdict(text) != row["judged"]
    ]


def line(name: str, half: str, rows: list[dict[str, Any]]) -> str:
    now, before = agreement(rows, "judged"), agreement(rows, "judged_before")
    figures = [f"{100 * now.share:.0f} %", *map(_figure, (now.kappa, now.kappa_of_success))]
    figures += [
        f"{100 * before.share:.0f} %",
        *map(_figure, (before.kappa, before.kappa_of_success)),
    ]
    return f"| {name} | {half} | {now.n} | {' | '.join(figures)} |"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", action="append", default=[], metavar="NAME=FILE")
    sets = json.loads(READINGS.read_text(encoding="utf-8"))["sets"]
    texts: dict[str, str] = {}
    for given in parser.parse_args().answers:
        answers = json.loads(Path(given.partition("=")[2]).read_text(encoding="utf-8"))
        texts |= {sha256_of(answer["response"]): answer["response"] for answer in answers}
    print(
        "| answers of | half | n | agreement | kappa | kappa of success | agreement before | kappa before "
        "| kappa of success before |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name, rows in sets.items():
        for half in HALVES:
            print(line(name, half, [row for row in rows if row["half"] == half]))
        for difference in judged_anew(rows, texts):
            print(f"{name}, {difference}")
    every = [row for rows in sets.values() for row in rows]
    for half in HALVES:
        print(line("all", half, [row for row in every if row["half"] == half]))


if __name__ == "__main__":
    main()
