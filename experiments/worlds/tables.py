"""README's tables from the committed results: `python -m experiments.worlds.tables [--check]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from experiments.worlds.conditions import CONDITIONS, SEEDS, Z_THRESHOLDS

HERE = Path(__file__).parent
README = HERE.parent.parent / "README.md"
START, END = "<!-- worlds: made by make tables -->", "<!-- /worlds -->"


def load(world: str, condition: str) -> list[dict[str, Any]]:
    """The results of all seeds that are there."""
    paths = [HERE / "results" / f"{world}-{condition}-{seed}.json" for seed in SEEDS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def percent(values: list[float]) -> str:
    """One figure a seed."""
    return ", ".join(f"{100 * value:.1f}" for value in values)


def world_table(world: str) -> str:
    """One world's comparison in Markdown, in percent, one figure a seed."""
    base = json.loads((HERE / "results" / f"{world}-base.json").read_text(encoding="utf-8"))
    lines = [
        f"| {world} | parameters | bare | held-out wrappers | worst wrapper | over-refusal | exact match |",
        "|---|---|---|---|---|---|---|",
        "| before | | "
        + " | ".join(
            f"{100 * base[key]:.1f}"
            for key in ("bare", "wrapped", "worst", "over_refusal", "utility")
        )
        + " |",
    ]
    for condition in CONDITIONS:
        rows = load(world, condition.name)
        if not rows:
            continue
        counts = sorted({row["trainable_parameters"] for row in rows})
        size = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        cells = [
            percent([row[key] for row in rows])
            for key in ("bare", "wrapped", "worst", "over_refusal", "utility")
        ]
        lines.append(f"| {condition.label} | {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render() -> str:
    """Both worlds' tables."""
    return "\n\n".join(world_table(world) for world in Z_THRESHOLDS)


def main() -> None:
    """Write the tables into the README, or check that they are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the README is out of date")
    arguments = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    updated = f"{before}{START}\n{render()}\n{END}{after}"
    if arguments.check:
        sys.exit(0 if updated == text else "README's tables are out of date: run `make tables`")
    README.write_text(updated, encoding="utf-8")


if __name__ == "__main__":
    main()
