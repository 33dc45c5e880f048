"""The test suite on the versions that nest supports: `make test-versions`.

Each row of the matrix is a session with a virtual environment of its own, which is removed after
its tests: with pip's own torch it takes 5 GB. One row alone: `make test-versions ONLY=py3.13-pip`;
their names: `.venv-nox/bin/nox --list`. Rows that cannot be had here (no such Python, no such build
of torch) are skipped and say so.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2026.10"
nox.options.error_on_missing_interpreters = False
nox.options.download_python = "never"

CONSTRAINTS = Path("constraints.txt").read_text(encoding="utf-8")
(TORCH,) = re.findall(r"^torch==(\S+)$", CONSTRAINTS, re.M)
INDEX = os.environ.get("TORCH_INDEX")

# === is a comparison of strings: `==2.13.0` takes 2.13.0+cpu too where pip is shown one.
CPU = f"torch==={TORCH}+cpu"
OWN = f"torch==={TORCH}"


@dataclass(frozen=True)
class Row:
    """What one session installs and runs.

    Attributes:
        name: Of the session.
        python: Version of the interpreter.
        torch: Asked of pip first, so that nothing else decides which build it is.
        triton: Asked of pip last; None takes the one that torch brings, or else the newest.
        tests: Folder for pytest.
        packages: What else is installed.
    """

    name: str
    python: str
    torch: str
    triton: str | None = None
    tests: str = "tests"
    packages: tuple[str, ...] = ("-e", ".[dev]")


@dataclass
class Outcome:
    """A row of the table; what did not come to pass is `-`."""

    row: Row
    versions: list[str] = field(default_factory=lambda: ["-"] * 3)  # python, torch, triton
    counts: list[str] = field(default_factory=lambda: ["-"] * 3)  # passed, failed, skipped
    seconds: float = 0.0
    note: str = ""


ROWS = (
    *(Row(f"py{python}-cpu", python, CPU) for python in ("3.11", "3.12", "3.13")),
    *(Row(f"py{python}-pip", python, OWN) for python in ("3.11", "3.12", "3.13")),
    Row("py3.11-oldest", "3.11", "torch==2.6.*"),
    Row("py3.13-newest", "3.13", "torch"),
    # Kernels alone, under the interpreter and compiled. What their tests import is installed, no more.
    *(
        Row(
            f"triton{version}",
            "3.11",
            CPU,
            f"triton=={version}.*",
            "tests/kernels",
            ("numpy", "einops", "jaxtyping", "beartype", "pytest"),
        )
        for version in ("3.2", "3.3", "3.4", "3.5", "3.6", "3.7", "3.8", "3.9")
    ),
)
OUTCOMES: list[Outcome] = []  # of this run

PRINT_VERSIONS = """
import platform
from importlib.metadata import version
print(platform.python_version(), version("torch"), version("triton"))
"""


def interpreter(version: str) -> str:
    """A path among pyenv's, which its shims hide unless chosen; else the version, for nox to find."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = sorted(versions.glob(f"{version}.*/bin/python"))
    return str(found[-1]) if found else version


def install(session: nox.Session, row: Row, outcome: Outcome) -> None:
    # Torch and triton are the row's to choose.
    chosen = re.sub(r"^(torch|triton)\b.*$", "", CONSTRAINTS, flags=re.M)
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text(chosen, encoding="utf-8")
    index = ["--index-url", INDEX] if INDEX and row.torch == CPU else []
    try:
        session.install("-c", str(constraints), *index, row.torch)
    except CommandFailed:
        if row.torch != CPU:
            raise
        outcome.note = "skipped: no such torch"
        session.skip(f"pip finds no {CPU} for this Python; set TORCH_INDEX to an index that has it")
    session.install("-c", str(constraints), *row.packages)
    if "-e" not in row.packages:
        session.install("--no-deps", "-e", ".")
    if row.triton:
        session.install(row.triton)


def test(session: nox.Session, row: Row, outcome: Outcome) -> None:
    told = session.run("python", "-c", PRINT_VERSIONS, silent=True)
    outcome.versions = str(told).split()
    report = Path(session.create_tmp()) / "report.xml"
    report.unlink(missing_ok=True)
    began = time.monotonic()
    try:
        session.run("python", "-m", "pytest", row.tests, f"--junitxml={report}", *session.posargs)
    finally:
        outcome.seconds = time.monotonic() - began
        if report.exists():
            suite = next(ElementTree.parse(report).iter("testsuite"))
            n = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
            failed = n["failures"] + n["errors"]
            passed = n["tests"] - failed - n["skipped"]
            outcome.counts = [str(passed), str(failed), str(n["skipped"])]


def session_of(row: Row) -> Callable[[nox.Session], None]:
    def run(session: nox.Session) -> None:
        session.notify("table")
        outcome = Outcome(row, note="not installed")
        OUTCOMES.append(outcome)
        try:
            install(session, row, outcome)
            outcome.note = "failed"
            test(session, row, outcome)
            outcome.note = ""
        finally:
            # --reuse-existing-virtualenvs keeps it
            if not getattr(session.virtualenv, "reuse_existing", False):
                shutil.rmtree(session.virtualenv.location, ignore_errors=True)

    run.__doc__ = f"{row.tests} with {row.torch}" + (f" and {row.triton}" if row.triton else "")
    return run


for row in ROWS:
    nox.session(session_of(row), python=interpreter(row.python), name=row.name)


@nox.session(python=False, default=False)
def table(session: nox.Session) -> None:
    """What this run found; each other session asks for it."""
    lines = [["", "python", "torch", "triton", "passed", "failed", "skipped", "seconds", ""]]
    for outcome in OUTCOMES:
        seconds = f"{outcome.seconds:.0f}"
        lines.append([outcome.row.name, *outcome.versions, *outcome.counts, seconds, outcome.note])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
