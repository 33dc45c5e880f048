"""`nest compare`: methods, controls and baselines on worlds and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from nest.cli.options import TALKING, Spread, Switch, Talking
from nest.cli.session import session
from nest.errors import InputError

EXAMPLE = "Example: nest compare --config experiments/compare/quick.toml --out quick"


def command(
    *,
    config: Path,
    out: Path | None = None,
    final: Switch = False,
    workers: str = "auto",
    device: str = "auto",
    restart: Switch = False,
    retry_failed: Switch = False,
    talking: Annotated[Talking, Spread] = TALKING,
) -> None:
    """Compare methods, controls and baselines with the same data, budget and judges.

    Args:
        config: TOML file: worlds, arms, seeds, and what each stage needs; docs/plan.md has all its keys.
        out: Folder for results, tables and report; by default named after the file. What it holds of the
            same comparison is not run again.
        final: Measure on the test splits, on which nothing was chosen; the results say so.
        workers: Processes that runs are spread over; auto takes one a GPU or core.
        device: auto, cpu, cuda, cuda:1, mps.
        restart: Begin anew, whatever an earlier run left in --out or, unfinished, beside it.
        retry_failed: Run those runs again that failed, and keep all others.
    """
    from nest import api
    from nest.comparison.tables import rich_table

    out = Path(f"{config.stem}-comparison") if out is None else out
    with session(talking) as run:
        found = api.compare(
            config,
            out,
            final=final,
            workers=_n_workers(workers),
            device=device,
            restart=restart,
            retry_failed=retry_failed,
            progress=run.progress,
            warn=run.warn,
        )
    run.result({"out": str(out), **found.to_json()}, rich_table(found), f"wrote {out}")


def _n_workers(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise InputError(f"--workers is {text!r}; it must be auto or a number from 1")
