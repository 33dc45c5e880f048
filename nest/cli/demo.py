"""`nest demo`: the whole job on the embedded model, with a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nest.cli.common import (
    ConfigOption,
    JsonOption,
    OverwriteOption,
    QuietOption,
    SeedOption,
    session,
)

HELP = "Select, tune, evaluate and fold on the embedded model, and write a report."
EXAMPLE = "Example: nest demo --out nest-demo"


def command(
    out: Annotated[
        Path, typer.Option("--out", help="Folder for everything the demo makes.")
    ] = Path("nest-demo"),
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    from nest.demo import run_demo
    from nest.reporting.tables import eval_table, selection_table

    with session(json, quiet) as run:
        found = run_demo(out, seed=seed, overwrite=overwrite, progress=run.progress, warn=run.warn)
    run.result(
        found.to_json(),
        selection_table(found.selection),
        eval_table(found.after, found.before),
        f"{found.patch.trainable_parameters:,} trained parameters "
        f"({100 * found.fraction_of_model:.2f} % of the model), {found.seconds:.0f} s",
        f"report: {found.report}",
    )
