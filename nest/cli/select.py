"""`nest select`: capture, score, choose, cluster."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from nest.cli.options import (
    LOADING,
    LONG_WRITING,
    PUTTING,
    RUNNING,
    Loading,
    LongWriting,
    Putting,
    Running,
    Spread,
    Switch,
    parse_batch_size,
)
from nest.cli.session import session
from nest.selection.config import PAPER, SelectionConfig
from nest.settings import as_in

EXAMPLE = (
    "Example: nest select --model organism --unsafe organism:unsafe --safe organism:safe "
    "--z 2 --out selection"
)
SETTINGS = SelectionConfig()


def command(
    *,
    model: str,
    out: Path,
    unsafe: str | None = None,
    safe: str | None = None,
    pairs: str | None = None,
    harmful: str | None = None,
    benign: str | None = None,
    settings: Annotated[SelectionConfig, Spread] = SETTINGS,
    paper: Switch = False,
    check_refusals: bool = True,
    refusal_phrases: Path | None = None,
    batch_size: str = "auto",
    putting: Annotated[Putting, Spread] = PUTTING,
    loading: Annotated[Loading, Spread] = LOADING,
    writing: Annotated[LongWriting, Spread] = LONG_WRITING,
    running: Annotated[Running, Spread] = RUNNING,
) -> None:
    """Find the neurons that refusal hangs on, and group them.

    Args:
        model: A local folder, a name on the Hub, or `organism`.
        out: Folder to write; it must not exist yet.
        unsafe: Prompts to be refused: FILE, FILE:COLUMN or a named set.
        safe: Prompts to be answered, about as many.
        pairs: Instead of both: a file with columns unsafe and safe.
        harmful: Dialogues for --scorer effect, gradient and learned: harmful prompts and the refusals to
            give. Without --unsafe their prompts are taken for those, too.
        benign: Dialogues, likewise: ordinary prompts and their good answers.
        check_refusals: Refuse --harmful responses that mostly comply, and --benign ones that mostly
            refuse.
        refusal_phrases: File of more refusal phrases, one a line.
        paper: Select as the paper does: --scorer probe --z 3, whatever of these stands at its default.
        batch_size: auto, or prompts a forward pass.
    """
    from nest import api
    from nest.artifacts.storage import check_output
    from nest.artifacts.unfinished import Unfinished, beside

    started = time.monotonic()
    if paper:
        settings = as_in(PAPER, settings, SETTINGS, "--paper")
    check_output(out, kind="selection", overwrite=writing.overwrite)
    size, switches = parse_batch_size(batch_size), putting.switches()
    with session(running) as run, ExitStack() as stack:
        network, tokenizer = run.load(model, loading)
        work = stack.enter_context(Unfinished(beside(out), restart=writing.restart, warn=run.warn))
        selection = api.select(
            network,
            tokenizer,
            unsafe=unsafe,
            safe=safe,
            pairs=pairs,
            harmful=harmful,
            benign=benign,
            check_refusals=check_refusals,
            refusal_phrases=refusal_phrases,
            system=putting.system,
            template_kwargs=switches,
            batch_size=size,
            progress=run.progress,
            warn=run.warn,
            work=work,
            **asdict(settings),
        )
        selection.save(out, overwrite=writing.overwrite)
    from nest.reporting.tables import selection_table

    trainable = selection.trainable_parameters("shared")
    run.result(
        {
            "selection": str(out),
            "sites": len(selection.sites),
            "neurons": selection.n_neurons,
            "clusters": selection.n_clusters,
            "trainable_parameters": trainable,
            "fraction_of_model": trainable / selection.provenance["parameters"],
            "probe_accuracy": selection.provenance["probe_accuracy"],
            "silhouette": selection.provenance["silhouette"],
            "seconds": time.monotonic() - started,
        },
        selection_table(selection),
        f"wrote {out}",
    )
