"""`nest tune`: train the cluster update, write the patch."""

from __future__ import annotations

import itertools
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

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
)
from nest.cli.session import session
from nest.errors import ActivationError, InputError, TuningStoppedError
from nest.settings import as_in
from nest.tuning.config import PAPER, TuningConfig

EXAMPLE = (
    "Example: nest tune --model organism --clusters selection --harmful organism:harmful "
    "--benign organism:benign --out patch"
)
SETTINGS = TuningConfig()


def command(
    *,
    model: str,
    clusters: Path,
    harmful: str,
    benign: str,
    out: Path,
    settings: Annotated[TuningConfig, Spread] = SETTINGS,
    paper: Switch = False,
    n_clusters: str | None = None,
    check_refusals: bool = True,
    refusal_phrases: Path | None = None,
    checkpoint_every: str = "60s",
    putting: Annotated[Putting, Spread] = PUTTING,
    loading: Annotated[Loading, Spread] = LOADING,
    writing: Annotated[LongWriting, Spread] = LONG_WRITING,
    running: Annotated[Running, Spread] = RUNNING,
) -> None:
    """Train one small shared update per cluster, with everything else frozen; write it as a patch.

    Args:
        model: A local folder, a name on the Hub, or `organism`.
        clusters: Folder that `nest select` wrote.
        harmful: Dialogues: harmful prompts and the refusals to give.
        benign: Dialogues: ordinary prompts and their good answers.
        out: Folder to write; it must not exist yet.
        paper: Tune as the paper does: --update shared --epochs 5 --kl-weight 0, whatever of these stands at
            its default.
        n_clusters: Cluster the neurons anew: auto, or clusters a site.
        check_refusals: Refuse --harmful responses that mostly comply, and --benign ones that mostly
            refuse.
        refusal_phrases: File of more refusal phrases, one a line.
        checkpoint_every: How often to keep a checkpoint beside --out: a time (60s, 5m), steps, or never.
    """
    from nest import api
    from nest.artifacts.storage import check_output
    from nest.artifacts.unfinished import Unfinished, beside
    from nest.reporting.tables import tuning_table
    from nest.selection.selection import NeuronSelection
    from nest.tuning.checkpoints import Every

    started = time.monotonic()
    if paper:
        settings = as_in(PAPER, settings, SETTINGS, "--paper")
    check_output(out, kind="patch", overwrite=writing.overwrite)
    if refusal_phrases is not None and not check_refusals:
        raise InputError(
            "--refusal-phrases plays no part with --no-check-refusals; give one of them"
        )
    Every.parse(checkpoint_every)
    anew, switches = _parse_n_clusters(n_clusters), putting.switches()
    selection = NeuronSelection.load(clusters)
    with session(running) as run, ExitStack() as stack:
        network, tokenizer = run.load(model, loading)
        work = stack.enter_context(Unfinished(beside(out), restart=writing.restart, warn=run.warn))
        try:
            result = api.tune_result(
                network,
                tokenizer,
                selection,
                harmful=harmful,
                benign=benign,
                n_clusters=anew,
                system=putting.system,
                template_kwargs=switches,
                check_refusals=check_refusals,
                refusal_phrases=refusal_phrases,
                progress=run.progress,
                notice=run.note,
                warn=run.warn,
                work=work,
                checkpoint_every=checkpoint_every,
                **asdict(settings),
            )
        except TuningStoppedError as fault:
            kept = _free_name(out.with_name(f"{out.name}-step-{fault.result.best_step}"))
            fault.result.patch.save(kept)
            raise ActivationError(f"{fault}: its patch is in {kept}") from None
        result.patch.save(out, overwrite=writing.overwrite)
    last = result.history[-1]
    n_model = result.patch.provenance["parameters"]
    run.result(
        {
            "patch": str(out),
            "trainable_parameters": result.patch.trainable_parameters,
            "fraction_of_model": result.patch.trainable_parameters / n_model,
            "steps": result.steps,
            "best_step": result.best_step,
            "train_loss": last.train_loss,
            "validation_loss": min(record.validation_loss for record in result.history),
            "seconds": time.monotonic() - started,
            "tokens_per_second": result.tokens_per_second,
            "memory_estimate_bytes": result.memory.needed,
        },
        tuning_table(result.history, result.best_step),
        f"wrote {out}: {result.patch.trainable_parameters:,} trained parameters, "
        f"{100 * result.patch.trainable_parameters / n_model:.3f} % of the model",
    )


def _parse_n_clusters(value: str | None) -> int | Literal["auto"] | None:
    if value is None:
        return None
    if value == "auto":
        return "auto"
    if value.isdecimal() and int(value) > 0:
        return int(value)
    raise InputError(f"--n-clusters is {value!r}; it must be auto or a number from 1")


def _free_name(path: Path) -> Path:
    """The path itself, or with a number where there is something already."""
    names = itertools.chain([path.name], (f"{path.name}-{i}" for i in itertools.count(2)))
    return next(free for name in names if not (free := path.with_name(name)).exists())
