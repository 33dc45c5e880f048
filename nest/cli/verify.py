"""`nest verify`: proof of what a patch changed and what it did not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from nest.cli.options import RUNNING, Running, Spread
from nest.cli.session import session
from nest.cli.streams import say

EXAMPLE = "Example: nest verify --model organism --patch patch --folded folded"


def command(
    *,
    model: str,
    patch: Path,
    folded: Path | None = None,
    revision: str | None = None,
    device: str = "auto",
    running: Annotated[Running, Spread] = RUNNING,
) -> None:
    """Prove what a patch changes in a checkpoint, and that it changes nothing else.

    Args:
        model: The checkpoint without the patch: a local folder, a name on the Hub, or `organism`.
        patch: Folder that `nest tune` wrote.
        folded: Checkpoint of `nest fold` to compare with --model.
        revision: Of a model on the Hub: branch, tag or commit.
        device: Where logits are computed: auto, cpu, cuda, cuda:1, mps.
    """
    from rich.table import Table

    from nest import api

    with session(running) as run:
        found = api.verify(model, patch, folded=folded, device=device, revision=revision)
    values: dict[str, Any] = found.to_json()
    table = Table(title="verified" if found.ok else "NOT verified", title_justify="left")
    table.add_column("what")
    table.add_column("found", justify="right")
    for key, value in values.items():
        table.add_row(key.replace("_", " "), str(value))
    run.result(values, table)
    if not found.ok:
        say(
            "error: the patch has no effect: the logits are the same with it and without it"
            if not found.has_effect
            else "error: this is not what the patch recorded: the checkpoint was folded with another "
            "patch, or one of both is damaged; fold it again"
        )
        raise SystemExit(1)
