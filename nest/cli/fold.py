"""`nest fold`: a checkpoint with the patch in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from nest.cli.options import RUNNING, WRITING, Running, Spread, Writing
from nest.cli.session import session

EXAMPLE = "Example: nest fold --model organism --patch patch --out folded"


def command(
    *,
    model: str,
    patch: Path,
    out: Path,
    revision: str | None = None,
    writing: Annotated[Writing, Spread] = WRITING,
    running: Annotated[Running, Spread] = RUNNING,
) -> None:
    """Write a checkpoint with the patch in its weights; all else is carried along.

    Args:
        model: The checkpoint that the patch was made for: a local folder, a name on the Hub, or
            `organism`.
        patch: Folder that `nest tune` wrote.
        out: Folder to write; it must not exist yet.
        revision: Of a model on the Hub: branch, tag or commit.
    """
    from nest import api

    with session(running) as run:
        result = api.fold(model, patch, out, revision=revision, overwrite=writing.overwrite)
    run.result(
        result.to_json(),
        f"wrote {result.out}: {result.rows_changed:,} rows in {result.tensors_changed} tensors",
        *(f"left out, since it would be without the change: {name}" for name in result.left_out),
    )
