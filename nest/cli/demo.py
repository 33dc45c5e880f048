"""`nest demo`: the whole job on the embedded model, with a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from nest.cli.options import RUNNING, WRITING, Running, Spread, Writing
from nest.cli.session import session

EXAMPLE = "Example: nest demo --out nest-demo"


def command(
    *,
    out: Path = Path("nest-demo"),
    seed: int = 0,
    writing: Annotated[Writing, Spread] = WRITING,
    running: Annotated[Running, Spread] = RUNNING,
) -> None:
    """Select, tune, evaluate and fold on the embedded model, and write a report.

    Args:
        out: Folder for everything the demo makes.
        seed: Decides everything random.
    """
    from nest.demo import run_demo
    from nest.reporting.tables import eval_table, selection_table

    with session(running) as run:
        found = run_demo(
            out, seed=seed, overwrite=writing.overwrite, progress=run.progress, warn=run.warn
        )
    run.result(
        found.to_json(),
        selection_table(found.selection),
        eval_table(found.after, found.before),
        f"{found.patch.trainable_parameters:,} trained parameters "
        f"({100 * found.fraction_of_model:.2f} % of the model), {found.seconds:.0f} s",
        f"report: {found.report}",
    )
