"""`nest revert`: the checkpoint as it was before, bit for bit."""

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

HELP = "Take a folded patch out again: every tensor is bit for bit as before."
EXAMPLE = "Example: nest revert --model folded --patch patch --out reverted"


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
        result = api.revert(model, patch, out, revision=revision, overwrite=overwrite)
    run.result(
        result.to_json(),
        f"wrote {result.out}: {result.rows_changed:,} rows in {result.tensors_changed} tensors",
        *(f"left out, since it may not be without the patch: {name}" for name in result.left_out),
    )
