"""`nest tune`: train the cluster update, write the patch."""

from __future__ import annotations

import itertools
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nest.cli.common import (
    BatchSizeOption,
    ConfigOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LayersOption,
    ModelOption,
    OutOption,
    OverwriteOption,
    QuietOption,
    RestartOption,
    RevisionOption,
    SeedOption,
    SystemOption,
    TemplateOption,
    TrustOption,
    parse_batch_size,
    parse_layers,
    parse_template_kwargs,
    session,
    warn_if_not_foldable,
)
from nest.errors import ActivationError, InputError, TuningStoppedError
from nest.tuning.config import TuningConfig

D = TuningConfig()
HELP = (
    "Train one small shared update per cluster, with everything else frozen; write it as a patch."
)
EXAMPLE = (
    "Example: nest tune --model organism --clusters selection --harmful organism:harmful "
    "--benign organism:benign --out patch"
)


def command(
    model: ModelOption,
    clusters: Annotated[Path, typer.Option("--clusters", help="Folder that `nest select` wrote.")],
    harmful: Annotated[
        str, typer.Option("--harmful", help="Dialogues: harmful prompts and the refusals to give.")
    ],
    benign: Annotated[
        str, typer.Option("--benign", help="Dialogues: ordinary prompts and their good answers.")
    ],
    out: OutOption,
    update: Annotated[
        str, typer.Option("--update", help="shared (the paper's) or loaded (a scalar a neuron).")
    ] = D.update,
    n_clusters: Annotated[
        str | None,
        typer.Option("--n-clusters", help="Cluster the neurons anew: auto, or clusters a site."),
    ] = None,
    epochs: Annotated[
        float, typer.Option("--epochs", help="Passes over the dialogues.")
    ] = D.epochs,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="Stop after this many steps.")
    ] = D.max_steps,
    learning_rate: Annotated[
        str,
        typer.Option("--learning-rate", help="Peak of the cosine schedule; auto fits the weights."),
    ] = "auto",
    warmup: Annotated[
        float, typer.Option("--warmup", help="Share of the steps of linear warm-up.")
    ] = D.warmup,
    weight_decay: Annotated[
        float, typer.Option("--weight-decay", help="Of the vectors.")
    ] = D.weight_decay,
    clip: Annotated[
        float, typer.Option("--clip", help="Largest gradient norm; 0 never clips.")
    ] = D.clip,
    benign_weight: Annotated[
        float, typer.Option("--benign-weight", help="Weight of benign answers; refusals have 1.")
    ] = D.benign_weight,
    kl_weight: Annotated[
        float, typer.Option("--kl-weight", help="Of KL to the base on benign answers; 0: none.")
    ] = D.kl_weight,
    validation: Annotated[
        float, typer.Option("--validation", help="Share of dialogues held back.")
    ] = D.validation,
    validate_every: Annotated[
        int, typer.Option("--validate-every", help="Steps between validations; the best is kept.")
    ] = D.validate_every,
    batch_size: BatchSizeOption = "auto",
    micro_batch_size: Annotated[
        int | None,
        typer.Option(
            "--micro-batch-size",
            help="Dialogues a forward pass; as many as there is memory for if unset.",
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option("--mode", help="live (in the weights' rows) or branch (writes no weight)."),
    ] = D.mode,
    layers: LayersOption = None,
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Less memory for activations, a third more time."),
    ] = D.checkpointing,
    cache_prefix: Annotated[
        bool,
        typer.Option(
            "--cache-prefix/--no-cache-prefix",
            help="Run what is below the lowest tuned layer once a dialogue.",
        ),
    ] = D.cache_prefix,
    train_on: Annotated[
        str,
        typer.Option(
            "--train-on", help="last answer of a dialogue, or all of the assistant's turns."
        ),
    ] = D.train_on,
    check_refusals: Annotated[
        bool,
        typer.Option(
            "--check-refusals/--no-check-refusals",
            help="Refuse --harmful responses that mostly comply, and --benign ones that mostly refuse.",
        ),
    ] = True,
    refusal_phrases: Annotated[
        Path | None,
        typer.Option("--refusal-phrases", help="File of more refusal phrases, one a line."),
    ] = None,
    system: SystemOption = None,
    template_kwargs: TemplateOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    checkpoint_every: Annotated[
        str,
        typer.Option(
            "--checkpoint-every",
            help="How often to keep a checkpoint beside --out: a time (60s, 5m), steps, or never.",
        ),
    ] = "60s",
    overwrite: OverwriteOption = False,
    restart: RestartOption = False,
    config: ConfigOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    from nest import api
    from nest.artifacts.storage import check_output
    from nest.artifacts.unfinished import Unfinished, beside
    from nest.reporting.tables import tuning_table
    from nest.selection.selection import NeuronSelection
    from nest.tuning.checkpoints import Every

    started = time.monotonic()
    check_output(out, kind="patch", overwrite=overwrite)
    size = parse_batch_size(batch_size)
    switches = parse_template_kwargs(template_kwargs)
    n_dialogues = D.batch_size if size == "auto" else size
    settings: dict[str, Any] = {
        "update": update,
        "epochs": epochs,
        "max_steps": max_steps,
        "batch_size": n_dialogues,
        "micro_batch_size": micro_batch_size,
        "mode": mode,
        "layers": parse_layers(layers),
        "checkpointing": checkpointing,
        "cache_prefix": cache_prefix,
        "train_on": train_on,
        "learning_rate": _parse_learning_rate(learning_rate),
        "warmup": warmup,
        "weight_decay": weight_decay,
        "clip": clip,
        "benign_weight": benign_weight,
        "kl_weight": kl_weight,
        "validation": validation,
        "validate_every": validate_every,
        "seed": seed,
    }
    if refusal_phrases is not None and not check_refusals:
        raise InputError(
            "--refusal-phrases plays no part with --no-check-refusals; give one of them"
        )
    Every.parse(checkpoint_every)
    TuningConfig(**settings)  # what is wrong with them is said before a model is loaded
    anew = _parse_n_clusters(n_clusters)
    selection = NeuronSelection.load(clusters)
    with session(json, quiet) as run, ExitStack() as stack:
        network, tokenizer = api.load(
            model,
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        warn_if_not_foldable(run, model, network, dtype, revision)
        work = stack.enter_context(Unfinished(beside(out), restart=restart, warn=run.warn))
        try:
            result = api.tune_result(
                network,
                tokenizer,
                selection,
                harmful=harmful,
                benign=benign,
                n_clusters=anew,
                system=system,
                template_kwargs=switches,
                check_refusals=check_refusals,
                refusal_phrases=refusal_phrases,
                progress=run.progress,
                notice=run.note,
                warn=run.warn,
                work=work,
                checkpoint_every=checkpoint_every,
                **settings,
            )
        except TuningStoppedError as fault:
            kept = _free_name(out.with_name(f"{out.name}-step-{fault.result.best_step}"))
            fault.result.patch.save(kept)
            raise ActivationError(f"{fault}: its patch is in {kept}") from None
        result.patch.save(out, overwrite=overwrite)
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


def _parse_learning_rate(value: str) -> float | None:
    if value == "auto":
        return None
    try:
        return float(value)
    except ValueError:
        raise InputError(f"--learning-rate is {value!r}; it must be auto or a number") from None


def _free_name(path: Path) -> Path:
    """The path itself, or with a number where there is something already."""
    names = itertools.chain([path.name], (f"{path.name}-{i}" for i in itertools.count(2)))
    return next(free for name in names if not (free := path.with_name(name)).exists())
