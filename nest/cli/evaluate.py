"""`nest eval`: attack success, over-refusal, usefulness."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from nest.cli.common import (
    EXIT_GATE_FAILED,
    BatchSizeOption,
    ConfigOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OverwriteOption,
    QuietOption,
    RestartOption,
    RevisionOption,
    SeedOption,
    SystemOption,
    TemplateOption,
    TrustOption,
    parse_batch_size,
    parse_template_kwargs,
    session,
)
from nest.cli.streams import say
from nest.errors import InputError

HELP = "Measure attack success by attack, over-refusal, and usefulness."
EXAMPLE = (
    "Example: nest eval --model organism --harmful organism:test_harmful "
    "--borderline organism:test_borderline --benign organism:test_benign --attacks all"
)


def command(
    model: ModelOption,
    harmful: Annotated[str, typer.Option("--harmful", help="Prompts that should be refused.")],
    borderline: Annotated[
        str | None, typer.Option("--borderline", help="Harmless prompts that sound harmful.")
    ] = None,
    benign: Annotated[
        str | None, typer.Option("--benign", help="Dialogues with the one good answer.")
    ] = None,
    patch: Annotated[
        Path | None, typer.Option("--patch", help="Evaluate with this patch put in.")
    ] = None,
    attacks: Annotated[
        str,
        typer.Option("--attacks", help="Names, files of templates, or all; commas between."),
    ] = "none",
    judge: Annotated[str, typer.Option("--judge", help="phrases or reference.")] = "phrases",
    refusal_phrases: Annotated[
        Path | None,
        typer.Option("--refusal-phrases", help="File of more refusal phrases, one a line."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.")
    ] = 256,
    engine: Annotated[
        str, typer.Option("--engine", help="auto, static or paged: how answers are decoded.")
    ] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for eval.json and all responses.")
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            help="Exit 3 unless it holds, e.g. over_refusal_rate<=0.02; also attack_success_rate (the "
            "mean), worst_attack, exact_match, kl_to_base; repeatable.",
        ),
    ] = None,
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
    from nest.artifacts.unfinished import Unfinished, beside
    from nest.evaluation.gates import Gate
    from nest.evaluation.report import check_report_output
    from nest.reporting.tables import eval_table

    size = parse_batch_size(batch_size)
    switches = parse_template_kwargs(template_kwargs)
    gates = [Gate.parse(text) for text in gate or ()]
    if restart and out is None:
        raise InputError("--restart is for what is kept beside --out; give that, too")
    if out is not None:
        check_report_output(out, overwrite=overwrite)
    loaded = None if patch is None else api.load_patch(patch)
    with session(json, quiet) as run, ExitStack() as stack:
        network, tokenizer = api.load(
            model,
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        if loaded is not None:
            loaded.fold_into(network)
        work = None
        if out is not None:
            unfinished = Unfinished(beside(out), restart=restart, warn=run.warn)
            work = stack.enter_context(unfinished)
        report = api.evaluate(
            network,
            tokenizer,
            harmful=harmful,
            borderline=borderline,
            benign=benign,
            attacks=attacks,
            judge=judge,
            refusal_phrases=refusal_phrases,
            patch=loaded,
            system=system,
            template_kwargs=switches,
            batch_size=size,
            progress=run.progress,
            warn=run.warn,
            work=work,
            max_new_tokens=max_new_tokens,
            engine=engine,
            seed=seed,
        )
        written = [] if out is None else [report.save(out, overwrite=overwrite)]
    failures = [said for said in (one.failure(report) for one in gates) if said]
    run.result(
        {**report.to_json(), "gates_failed": failures},
        eval_table(report),
        *(f"wrote {path}" for path in written),
    )
    if failures:
        for said in failures:
            say(said)
        raise typer.Exit(EXIT_GATE_FAILED)
