"""README's tables from the committed comparisons: `python -m experiments.compare.tables [--check]`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
START, END = "<!-- compare: made by make tables -->", "<!-- /compare -->"
RESULTS = (ROOT / "experiments/compare/results", ROOT / "experiments/real/results")
SECTIONS = (
    *("All worlds", "Worlds that no setting was chosen on", "Worlds that settings were chosen on"),
    *("Other judges", "Weights on benign answers", "Steps until attack success stays down"),
    "What undoes it",
)
"""Of each comparison's own tables, which the README shows."""


def sections_of(text: str) -> dict[str, str]:
    """What stands under each heading of a comparison's tables.md."""
    parts = re.split(r"^## (.+)$", text, flags=re.M)
    return {name: body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def render() -> str:
    """Each comparison with its first table, and where the rest of it is."""
    said = []
    for folder in (
        one for results in RESULTS if results.is_dir() for one in sorted(results.iterdir())
    ):
        text = (folder / "tables.md").read_text(encoding="utf-8")
        title, _, rest = text.partition("\n\n")
        measured = rest.partition("\n\n")[0]
        where = folder.relative_to(ROOT)
        said.append(f"### {title.removeprefix('# ')}\n\n{measured}\n")
        said.append(f"[All tables]({where}/tables.md), [report]({where}/report.html).\n")
        sections = sections_of(text)
        for name in SECTIONS:
            if name in sections:
                said.append(f"**{name}**\n\n{sections[name]}\n")
    return "\n".join(said)


def main() -> None:
    """Write the tables into the README, or check that they are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the README is out of date")
    arguments = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    updated = f"{before}{START}\n{render()}{END}{rest.split(END)[1]}"
    if arguments.check:
        sys.exit(0 if updated == text else "README's tables are out of date: run `make tables`")
    README.write_text(updated, encoding="utf-8")


if __name__ == "__main__":
    main()
