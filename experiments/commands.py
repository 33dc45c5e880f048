"""docs/commands.md: every subcommand and option, from the declarations that the command line is made of."""

from __future__ import annotations

from pathlib import Path

from nest.cli.main import app

COMMANDS = Path(__file__).parents[1] / "docs" / "commands.md"


def render() -> str:
    """The document; how it is laid out is cyclopts'."""
    return f"<!-- made by make docs -->\n{app.generate_docs(usage_name='nest').rstrip()}\n"


if __name__ == "__main__":
    COMMANDS.parent.mkdir(exist_ok=True)
    COMMANDS.write_text(render(), encoding="utf-8")
