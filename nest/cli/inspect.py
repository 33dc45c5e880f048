"""`nest inspect`: what is in a selection or a patch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nest.cli.common import ConfigOption, JsonOption, OverwriteOption, QuietOption, session

HELP = "Show what is in a selection or a patch: a table by layer, and plots."
EXAMPLE = "Example: nest inspect selection --plots plots"


def command(
    artifact: Annotated[Path, typer.Argument(help="Folder of `nest select` or `nest tune`.")],
    plots: Annotated[
        Path | None,
        typer.Option("--plots", help="Folder for SVG plots: neurons by layer, cluster map."),
    ] = None,
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    from nest.cli.artifacts import describe, load_artifact, write_plots
    from nest.reporting.tables import selection_table

    with session(json, quiet) as run:
        selection, patch = load_artifact(artifact)
        written = [] if plots is None else write_plots(selection, patch, plots, overwrite=overwrite)
    values: dict[str, Any] = describe(selection, patch)
    run.result(
        {**values, "plots": [str(path) for path in written]},
        selection_table(selection),
        *(
            f"{key}: {value}"
            for key, value in values.items()
            if not isinstance(value, (dict, list))
        ),
        *(f"wrote {path}" for path in written),
    )
