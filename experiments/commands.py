"""docs/commands.md: every subcommand and option, from the declarations that the command line is made of.

`python -m experiments.commands` writes it, and docs/plan.md with it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

from experiments import plan_keys
from nest.cli.main import app

COMMANDS = Path(__file__).parents[1] / "docs" / "commands.md"


def render() -> str:
    """The document; how it is laid out is cyclopts', which names the program that runs."""
    with mock.patch.object(sys, "argv", ["nest"]):
        text = app.generate_docs()
    return f"<!-- made by make docs -->\n{text.rstrip()}\n"


if __name__ == "__main__":
    COMMANDS.parent.mkdir(exist_ok=True)
    COMMANDS.write_text(render(), encoding="utf-8")
    plan_keys.PLAN.write_text(plan_keys.render(), encoding="utf-8")
