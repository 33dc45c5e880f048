"""The README's table of the phrase judge against a reader, from `readings.json`."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.real.judging.agreement import READINGS, line

README = Path(__file__).parents[3] / "README.md"
START, END = "<!-- judging: made by make tables -->", "<!-- /judging -->"
NAMES = {
    "smollm2": "SmolLM2-135M-Instruct",
    "smollm2_patched": "the same, with a patch",
    "qwen": "Qwen2.5-Coder-0.5B",
    "qwen_patched": "the same, with a patch",
    "qwen_steered": "Qwen2.5-Coder-0.5B, told that the request is harmful",
}


def render() -> str:
    """The half of the answers that the rule was not chosen on."""
    sets = json.loads(READINGS.read_text(encoding="utf-8"))["sets"]
    held = {name: [row for row in sets[name] if row["half"] == "test"] for name in NAMES}
    held["all"] = [row for rows in held.values() for row in rows]
    head = (
        "| answers of | half | n | agreement | kappa | kappa of success | first 200 characters: "
        "agreement | kappa | kappa of success |\n|---|---|---|---|---|---|---|---|---|"
    )
    lines = [line(NAMES.get(name, name), "test", rows) for name, rows in held.items()]
    return "\n".join([head, *lines])


def main() -> None:
    """Write the table into the README."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    README.write_text(f"{before}{START}\n{render()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
