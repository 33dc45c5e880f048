"""`nest revert`: the checkpoint as it was before, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from nest.cli.options import RUNNING, WRITING, Running, Spread, Writing
from nest.cli.session import session

EXAMPLE = "Example: nest revert --model folded --patch patch --out reverted"


def command(
    *,
    model: str,
    patch: Path,
    out: Path,
    revision: str | None = None,
    writing: Annotated[Writing, Spread] = WRITING,
    running: Annotated[Running, Spread] = RUNNING,
) -> None:
    """Take a folded patch out again: every tensor is bit for bit as before.

    Args:
        model: The folded checkpoint: a local folder or a name on the Hub.
        patch: Folder that `nest tune` wrote.
        out: Folder to write; it must not exist yet.
        revision: Of a model on the Hub: branch, tag or commit.
    """
    from nest import api

    with session(running) as run:
        result = api.revert(model, patch, out, revision=revision, overwrite=writing.overwrite)
    run.result(
        result.to_json(),
        f"wrote {result.out}: {result.rows_changed:,} rows in {result.tensors_changed} tensors",
        *(f"left out, since it may not be without the patch: {name}" for name in result.left_out),
    )
