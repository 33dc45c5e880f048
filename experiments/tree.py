"""The README's tree: every file with the first sentence of what it says of itself."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
START, END = "<!-- tree: made by make docs -->", "<!-- /tree -->"
ROOMS = (
    *(
        "cli",
        "api",
        "comparison",
        "worlds",
        "reporting",
        "methods",
        "evaluation",
        "scoring",
        "tuning",
        "patches",
        "selection",
    ),
    *("judging", "generation", "activations", "prompts", "conversations", "models", "organism"),
    "artifacts",
)
"""The folders of nest/, in the order in which one may use those after it; pyproject.toml's contract."""


def phrase(file: Path) -> str:
    """The first sentence of a module's docstring.

    Raises:
        ValueError: it has none.
    """
    said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if not said:
        raise ValueError(f"{file.relative_to(ROOT)} does not say what it is; give it a docstring")
    first = " ".join(said.split("\n\n")[0].split())
    return first.split(". ")[0].rstrip(".")


def render() -> str:
    """nest/ and kernels/ file by file."""
    lines = ["nest/"]
    own = sorted((ROOT / "nest").glob("*.py"))
    lines += [_line(file, 1) for file in own if file.name != "__init__.py"]
    for room in ROOMS:
        lines.append(f"  {room}/")
        lines += _files(ROOT / "nest" / room, 2)
    lines.append("kernels/")
    lines += _files(ROOT / "kernels", 1)
    for folder in sorted(path.parent for path in (ROOT / "kernels").glob("*/__init__.py")):
        lines.append(f"  {folder.name}/")
        lines += _files(folder, 2)
    return "\n".join(f"    {line}" for line in lines)


def _files(folder: Path, depth: int) -> list[str]:
    files = sorted(folder.glob("*.py"))
    return [
        _line(file, depth)
        for file in files
        if file.name != "__init__.py" or ast.get_docstring(ast.parse(file.read_text()))
    ]


def _line(file: Path, depth: int) -> str:
    name = f"{'  ' * depth}{file.name}"
    return f"{name:<26}{phrase(file)}"


def main() -> None:
    """Write the tree into the README."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    README.write_text(f"{before}{START}\n{render()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
