"""Runs the real entry point, in-process or as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COMMANDS = ("demo", "select", "inspect", "tune", "eval", "fold", "revert", "verify")


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1, self.out
        values: dict[str, Any] = json.loads(self.out)
        return values

    @property
    def error(self) -> str:
        """The one line on stderr, after what the stages noted and warned of."""
        assert self.code == 1, (self.code, self.out, self.err)
        assert not self.out
        lines = [
            line
            for line in self.err.splitlines()
            if not line.startswith(("warning: ", "memory: ", "responses: ", "going on "))
        ]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")


@dataclass(frozen=True)
class World:
    """A checkpoint, prompt files, and a selection and patch made by the command line."""

    folder: Path
    model: Path
    data: dict[str, str]
    selection: Path
    patch: Path
    select: Finished
    tune: Finished


Nest = Callable[..., Finished]


def in_process(monkeypatch: Any, capsys: Any) -> Nest:
    """`nest ARGUMENTS` through `nest.cli.main.run`."""
    from nest.cli.main import run

    def nest(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["nest", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            run()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return Finished(code, out, err)

    return nest


def as_user(*arguments: object, before: str = "", cwd: Path | None = None, **env: str) -> Finished:
    """`nest ARGUMENTS` in a process of its own, without jaxtyping's hook."""
    code = f"{before}\nfrom nest.cli.main import run\nrun()"
    paths = [str(ROOT), *(path for path in sys.path if path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **env},
        timeout=120,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def everything_under(folder: Path) -> dict[str, bytes]:
    """Every file, to see that nothing was written or changed."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def with_options(arguments: Sequence[object], *options: object) -> list[object]:
    """The arguments with these options in place of their own: one that is given twice is refused."""
    kept = list(arguments)
    for flag in options[::2]:
        if flag in kept:
            place = kept.index(flag)
            del kept[place : place + 2]
    return [*kept, *options]


def select_arguments(model: Path, data: dict[str, str], out: Path) -> Sequence[object]:
    return (
        *("select", "--model", model, "--unsafe", data["unsafe"], "--safe", data["safe"]),
        *("--z", "1", "--out", out),
    )


def tune_arguments(
    model: Path, clusters: Path, data: dict[str, str], out: Path
) -> Sequence[object]:
    return (
        *("tune", "--model", model, "--clusters", clusters, "--harmful", data["harmful"]),
        *("--benign", data["benign"], "--epochs", 9, "--max-steps", 6, "--learning-rate", 0.05),
        *("--validate-every", 2, "--out", out),
    )
