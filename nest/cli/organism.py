"""`nest organism`: the embedded model as plain files, and the recipe that rebuilds it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nest.cli.common import (
    ConfigOption,
    JsonOption,
    OverwriteOption,
    QuietOption,
    reporting_errors,
    session,
)

HELP = "The embedded model and its prompt sets."
app = typer.Typer(no_args_is_help=True, help=HELP)


@app.command(
    "export",
    help="Write the embedded model and its prompt sets as plain files.",
    epilog="Example: nest organism export organism",
)
@reporting_errors
def export(
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.")],
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    from nest.worlds.build import export_organism

    with session(json, quiet) as run:
        export_organism(folder, overwrite=overwrite)
    run.result(
        {"out": str(folder), "model": str(folder / "model"), "prompts": str(folder / "prompts")},
        f"wrote {folder}/model and {folder}/prompts; what it is stands in {folder}/README.md",
    )


@app.command(
    "build",
    help="Train an organism from its recipe, measure it and write its folder.",
    epilog="Example: nest organism build rebuilt --world bazaar",
)
@reporting_errors
def build(
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.")],
    world: Annotated[
        str, typer.Option("--world", help="bazaar (the embedded model) or harbour.")
    ] = "bazaar",
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    from nest.worlds.build import build_organism

    with session(json, quiet) as run:
        measured = build_organism(world, folder, overwrite=overwrite, progress=run.progress)
    run.result(
        {"out": str(folder), **measured},
        *(f"{key}: {value}" for key, value in measured.items() if isinstance(value, float)),
        f"wrote {folder}",
    )
