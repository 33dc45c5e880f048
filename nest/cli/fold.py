"""`nest fold`: a checkpoint with the patch in its weights."""

from __future__ import annotations

from nest.cli.common import (
    ConfigOption,
    JsonOption,
    ModelOption,
    OutOption,
    OverwriteOption,
    PatchOption,
    QuietOption,
    RevisionOption,
    session,
)

HELP = "Write a checkpoint with the patch in its weights; all else is carried along."
EXAMPLE = "Example: nest fold --model organism --patch patch --out folded"


def command(
    model: ModelOption,
    patch: PatchOption,
    out: OutOption,
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    from nest import api

    with session(json, quiet) as run:
        result = api.fold(model, patch, out, revision=revision, overwrite=overwrite)
    run.result(
        result.to_json(),
        f"wrote {result.out}: {result.rows_changed:,} rows in {result.tensors_changed} tensors",
        *(f"left out, since it would be without the change: {name}" for name in result.left_out),
    )
