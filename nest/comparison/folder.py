"""The folder of a comparison: what is written of it, sealed, and what of it is gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nest.artifacts.provenance import package_versions
from nest.artifacts.storage import check_output, check_sealed, read_manifest, write_artifact
from nest.comparison.ledger import read_lines
from nest.comparison.result import Comparison
from nest.errors import InputError

KIND, FORMAT = "comparison", "1.1"
JOURNAL = "journal.jsonl"
BULKY = ("outcomes", "history", "groups")
"""Of a run's figures, what stays in the journal."""


def write_folder(
    comparison: Comparison,
    out: str | Path,
    *,
    journal: str,
    identity: Mapping[str, Any],
    made: Mapping[str, str],
) -> None:
    """Write results.json, costs.json, tables.md, report.html and journal.jsonl, all of them sealed.

    Args:
        comparison: What was found.
        out: Replaced, where it holds an earlier comparison.
        journal: A line a run, for a later comparison to go on from.
        identity: What that one may not differ in.
        made: By which command and when, for the report.

    Raises:
        OutputExistsError: something else is there.
        NestError: the disk would not take it.
    """
    from nest.comparison.page import page
    from nest.comparison.tables import tables

    files = {
        "results.json": _text(results(comparison)),
        "costs.json": _text(costs(comparison)),
        "tables.md": tables(comparison),
        "report.html": page(comparison, made),
        JOURNAL: journal,
    }
    write_artifact(
        out,
        kind=KIND,
        manifest={
            "format_version": FORMAT,
            "identity": identity,
            "versions": package_versions(),
        },
        tensors={},
        files=files,
        hashed=tuple(files),
        overwrite=True,
    )


def results(comparison: Comparison) -> dict[str, Any]:
    """What depends on the runs alone and not on the machine's speed: the same bytes again."""
    return {
        "title": comparison.plan.title,
        "measured_on": "test" if comparison.final else "development",
        "plan": comparison.plan.without_folders(),
        "pools": dict(comparison.pools),
        "worlds": {
            name: {**asdict(facts), "base": _slim(comparison.base[name])}
            for name, facts in comparison.worlds.items()
        },
        "choices": {arm: asdict(choice) for arm, choice in comparison.choices.items()},
        "summaries": [
            {key: value for key, value in asdict(one).items() if key != "costs"}
            for one in comparison.all_summaries()
        ],
        "by_other_judges": comparison.by_other_judges(),
        "fronts": comparison.fronts(),
        "anytime": [_without_seconds(row) for row in comparison.anytime()],
        "robustness": comparison.robustness(),
        "runs": [
            {
                **{"task": run.task.to_json(), "failed": run.outcome.failed},
                **{"warnings": list(run.outcome.warnings), **_slim(run.outcome.figures)},
            }
            for run in comparison.runs
        ],
    }


def costs(comparison: Comparison) -> dict[str, Any]:
    """What was measured of the machine: seconds and memory."""
    return {
        "runs": [{"task": run.task.to_json(), **run.outcome.cost} for run in comparison.runs],
        "anytime": comparison.anytime(),
        "at_equal_seconds": comparison.at_equal_seconds(),
    }


def earlier_runs(
    out: Path, identity: Mapping[str, Any], warn: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The runs of a finished comparison in the folder.

    Raises:
        OutputExistsError: something else is there.
        InputError: a comparison with other settings is there, or its journal is not as it was written.
    """
    check_output(out, kind=KIND, overwrite=True)
    if not out.exists() or not any(out.iterdir()):
        return []
    manifest = read_manifest(out, kind=KIND)
    then = manifest.get("identity")
    if then != identity:
        if isinstance(then, dict) and then.get("final") != identity["final"]:
            was = "the test splits (--final)" if then.get("final") else "development splits"
            raise InputError(
                f"{out} holds a comparison on {was}; choose another --out, so that both stay apart"
            )
        raise InputError(
            f"{out} holds a comparison with another judge, [evaluation] or number of threads; choose "
            "another --out, or begin anew with --restart"
        )
    if manifest.get("versions") != package_versions():
        warn(
            f"the runs in {out} were made with other versions ({_told(manifest.get('versions'))}): new "
            "ones can differ from them in more than their arms"
        )
    journal = out / JOURNAL
    if not journal.is_file():
        return []
    check_sealed(
        out,
        manifest,
        JOURNAL,
        kind=KIND,
        others=False,  # tables and report are written anew, whatever became of them
        mend="choose another --out, or begin anew with --restart",
    )
    return read_lines(journal)


def _told(versions: Any) -> str:
    if not isinstance(versions, Mapping):
        return "unknown"
    now = package_versions()
    return ", ".join(f"{k} {v}" for k, v in versions.items() if now.get(k) != v)


def _slim(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in figures.items() if key not in BULKY}


def _without_seconds(row: Mapping[str, Any]) -> dict[str, Any]:
    curve = [{k: v for k, v in point.items() if k != "seconds"} for point in row["curve"]]
    return {**{k: v for k, v in row.items() if k != "seconds_to_level"}, "curve": curve}


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n"
