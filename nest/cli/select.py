"""`nest select`: capture, probe, z-score, cluster."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Annotated

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

HELP = "Find the neurons that tell unsafe prompts from safe ones, and group them."
EXAMPLE = (
    "Example: nest select --model organism --unsafe organism:unsafe --safe organism:safe "
    "--z 2 --out selection"
)


def command(
    model: ModelOption,
    out: OutOption,
    unsafe: Annotated[
        str | None,
        typer.Option("--unsafe", help="Prompts to be refused: FILE, FILE:COLUMN or a named set."),
    ] = None,
    safe: Annotated[
        str | None, typer.Option("--safe", help="Prompts to be answered, about as many.")
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option("--pairs", help="Instead of both: a file with columns unsafe and safe."),
    ] = None,
    z: Annotated[
        float, typer.Option("--z", help="Keep neurons whose z-score is above this.")
    ] = 3.0,
    side: Annotated[
        str,
        typer.Option("--side", help="positive (speaks for unsafe, the paper's) or both."),
    ] = "positive",
    pool: Annotated[
        str, typer.Option("--pool", help="Over a prompt's tokens: max, mean, last.")
    ] = "max",
    scorer: Annotated[
        str, typer.Option("--scorer", help="probe (logistic regression) or contrast.")
    ] = "probe",
    cluster_scope: Annotated[
        str, typer.Option("--cluster-scope", help="Cluster per projection or per layer.")
    ] = "projection",
    max_clusters: Annotated[
        int | None, typer.Option("--max-clusters", help="At most this many clusters a group.")
    ] = None,
    layers: LayersOption = None,
    system: SystemOption = None,
    template_kwargs: TemplateOption = None,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = "auto",
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    restart: RestartOption = False,
    config: ConfigOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    from nest import api
    from nest.artifacts.storage import check_output
    from nest.artifacts.unfinished import Unfinished, beside

    started = time.monotonic()
    check_output(out, kind="selection", overwrite=overwrite)
    size = parse_batch_size(batch_size)
    switches = parse_template_kwargs(template_kwargs)
    wanted_layers = parse_layers(layers)
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
        selection = api.select(
            network,
            tokenizer,
            unsafe=unsafe,
            safe=safe,
            pairs=pairs,
            system=system,
            template_kwargs=switches,
            batch_size=size,
            progress=run.progress,
            warn=run.warn,
            work=work,
            z_threshold=z,
            side=side,
            pool=pool,
            scorer=scorer,
            cluster_scope=cluster_scope,
            layers=wanted_layers,
            max_clusters=max_clusters,
            seed=seed,
        )
        selection.save(out, overwrite=overwrite)
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
