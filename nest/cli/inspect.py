"""`nest inspect`: what is in a selection or a patch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from nest.cli.options import RUNNING, WRITING, Running, Spread, Writing
from nest.cli.session import session

EXAMPLE = "Example: nest inspect selection --plots plots"


def command(
    artifact: Path,
    /,
    *,
    plots: Path | None = None,
    writing: Annotated[Writing, Spread] = WRITING,
    running: Annotated[Running, Spread] = RUNNING,
) -> None:
    """Show what is in a selection or a patch: a table by layer, and plots.

    Args:
        artifact: Folder of `nest select` or `nest tune`.
        plots: Folder for SVG plots: neurons by layer, cluster map.
    """
    from nest.api.inspecting import describe, load_artifact, write_plots
    from nest.reporting.tables import selection_table

    with session(running) as run:
        selection, patch = load_artifact(artifact)
        written = []
        if plots is not None:
            written = write_plots(selection, patch, plots, overwrite=writing.overwrite)
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
