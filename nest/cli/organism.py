"""`nest organism`: the embedded model as plain files, and the recipe that rebuilds it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App

from nest.cli.options import RUNNING, WRITING, Running, Spread, Writing
from nest.cli.session import session

app = App(name="organism", help="The embedded model and its prompt sets.")


@app.command(help_epilogue="Example: nest organism export organism")
def export(
    folder: Path,
    /,
    *,
    writing: Annotated[Writing, Spread] = WRITING,
    running: Annotated[Running, Spread] = RUNNING,
) -> None:
    """Write the embedded model and its prompt sets as plain files.

    Args:
        folder: Folder to write; it must not exist yet.
    """
    from nest.worlds.build import export_organism

    with session(running) as run:
        export_organism(folder, overwrite=writing.overwrite)
    run.result(
        {"out": str(folder), "model": str(folder / "model"), "prompts": str(folder / "prompts")},
        f"wrote {folder}/model and {folder}/prompts; what it is stands in {folder}/README.md",
    )


@app.command(help_epilogue="Example: nest organism build rebuilt --world bazaar")
def build(
    folder: Path,
    /,
    *,
    world: str = "bazaar",
    writing: Annotated[Writing, Spread] = WRITING,
    running: Annotated[Running, Spread] = RUNNING,
) -> None:
    """Train an organism from its recipe, measure it and write its folder.

    Args:
        folder: Folder to write; it must not exist yet.
        world: bazaar (the embedded model), harbour, orchard, foundry, glacier, citadel or meadow.
    """
    from nest.worlds.build import build_organism

    with session(running) as run:
        measured = build_organism(world, folder, overwrite=writing.overwrite, progress=run.progress)
    run.result(
        {"out": str(folder), **measured},
        *(f"{key}: {value}" for key, value in measured.items() if isinstance(value, float)),
        f"wrote {folder}",
    )
