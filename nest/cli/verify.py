"""`nest verify`: proof of what a patch changed and what it did not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from nest.cli.common import (
    ConfigOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    PatchOption,
    QuietOption,
    RevisionOption,
    session,
)
from nest.cli.streams import say

HELP = "Prove what a patch changes in a checkpoint, and that it changes nothing else."
EXAMPLE = "Example: nest verify --model organism --patch patch --folded folded"


def command(
    model: ModelOption,
    patch: PatchOption,
    folded: Annotated[
        Path | None,
        typer.Option("--folded", help="Checkpoint of `nest fold` to compare with --model."),
    ] = None,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    config: ConfigOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    from nest import api

    with session(json, quiet) as run:
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
        raise typer.Exit(1)
