"""`nest.compare`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from nest.comparison.plan import Plan
    from nest.comparison.result import Comparison
    from nest.progress import ProgressCallback


def compare(
    config: str | Path | Mapping[str, Any] | Plan,
    out: str | Path,
    *,
    final: bool = False,
    workers: int | Literal["auto"] = "auto",
    device: str = "auto",
    restart: bool = False,
    retry_failed: bool = False,
    progress: ProgressCallback | None = None,
    warn: Callable[[str], None] | None = None,
) -> Comparison:
    """Compare methods, controls and baselines on worlds and seeds, with the same data, budget and judges.

    What is finished is kept beside `out`, and in it once all is: the same call goes on after an
    interruption, and a comparison to which arms, worlds, seeds or stages were added runs those alone.

    Args:
        config: A TOML file, or its content: worlds, arms, seeds, and what each stage needs.
        out: Folder for results.json, costs.json, tables.md, report.html and the journal.
        final: Measure on the test splits, which nothing may be chosen on; otherwise on development.
        workers: Processes that runs are spread over; `auto` takes one a GPU, or one for every
            `threads` cores.
        device: auto, cpu, cuda, ...
        restart: Begin anew: neither what an interrupted call left beside `out` nor the runs in it are gone
            on with.
        retry_failed: Run those of them again that failed, and keep all others.
        progress: Called with stage, runs done, runs in all.
        warn: Told what deserves attention; by default a Python warning.

    Raises:
        InputError: a world, arm, judge or prompt that cannot be used; all that is wrong with the config is
            named at once. Also where `out`, or what is kept beside it, is of another comparison.
        EngineError: a worker died over the same run again and again; all others are done, and kept.
    """
    import warnings

    from nest.comparison.plan import Plan
    from nest.comparison.plan_file import read_plan
    from nest.comparison.run import run_comparison

    plan = config
    if isinstance(plan, (str, Path)):
        plan = read_plan(plan)
    elif not isinstance(plan, Plan):
        plan = Plan(**plan)
    return run_comparison(
        plan,
        out,
        final=final,
        workers=workers,
        device=device,
        restart=restart,
        retry_failed=retry_failed,
        command=_command(config, out, final, workers, device),
        progress=progress,
        warn=warn or (lambda text: warnings.warn(text, stacklevel=3)),
    )


def _command(
    config: str | Path | Mapping[str, Any] | Plan,
    out: str | Path,
    final: bool,
    workers: int | Literal["auto"],
    device: str,
) -> str:
    """What to type for the same comparison; of whole paths only the last name, as in the results."""

    def name(path: str | Path) -> str:
        return Path(path).name if Path(path).is_absolute() else str(path)

    if not isinstance(config, (str, Path)):
        return f"nest.compare(plan, {Path(out).name!r}, final={final})"
    options = ["--final"] if final else []
    for option, value in (("--workers", workers), ("--device", device)):
        options += [] if value == "auto" else [option, str(value)]
    return shlex.join(["nest", "compare", "--config", name(config), "--out", name(out), *options])
