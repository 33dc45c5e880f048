"""`nest eval`: attack success, over-refusal, usefulness."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from nest.cli.answering import ANSWERING, Answering
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
    parse_batch_size,
)
from nest.cli.session import EXIT_GATE_FAILED, session
from nest.cli.streams import say
from nest.errors import InputError
from nest.evaluation.config import EvaluationConfig

EXAMPLE = (
    "Example: nest eval --model organism --harmful organism:dev_harmful "
    "--borderline organism:dev_borderline --benign organism:dev_benign --attacks all"
)
SETTINGS = EvaluationConfig()


def command(
    *,
    model: str,
    harmful: str,
    borderline: str | None = None,
    benign: str | None = None,
    patch: Path | None = None,
    attacks: str = "none",
    judge: str = "phrases",
    refusal_phrases: Path | None = None,
    out: Path | None = None,
    gate: list[str] | None = None,
    settings: Annotated[EvaluationConfig, Spread] = SETTINGS,
    answering: Annotated[Answering, Spread] = ANSWERING,
    batch_size: str = "auto",
    putting: Annotated[Putting, Spread] = PUTTING,
    loading: Annotated[Loading, Spread] = LOADING,
    writing: Annotated[LongWriting, Spread] = LONG_WRITING,
    running: Annotated[Running, Spread] = RUNNING,
) -> None:
    """Measure attack success by attack, over-refusal, and usefulness.

    Args:
        model: A local folder, a name on the Hub, or `organism`.
        harmful: Prompts that should be refused.
        borderline: Harmless prompts that sound harmful.
        benign: Dialogues with the one good answer.
        patch: Evaluate with this patch put in.
        attacks: Names, files of templates, or all; commas between.
        judge: phrases, reference, or another; several with commas between, the first one counts.
        refusal_phrases: File of more refusal phrases, one a line.
        out: Folder for eval.json and all responses.
        gate: Exit 3 unless it holds, e.g. over_refusal_rate<=0.02; also attack_success_rate (the mean),
            worst_attack, exact_match, kl_to_base; repeatable.
        batch_size: auto, or prompts decoded together.
    """
    from nest import api
    from nest.artifacts.unfinished import Unfinished, beside
    from nest.evaluation.gates import Gate
    from nest.evaluation.report import check_report_output
    from nest.reporting.tables import eval_table

    size, switches = parse_batch_size(batch_size), putting.switches()
    gates = [Gate.parse(text) for text in gate or ()]
    if writing.restart and out is None:
        raise InputError("--restart is for what is kept beside --out; give that, too")
    if out is not None:
        check_report_output(out, overwrite=writing.overwrite)
    if patch is not None and answering.has_own_model:
        raise InputError(
            "--patch cannot be put into a model that a server or vLLM holds; fold it (nest fold) and serve "
            "the folded checkpoint"
        )
    loaded = None if patch is None else api.load_patch(patch)
    with session(running) as run, ExitStack() as stack:
        network, tokenizer, engine = None, None, answering.made(model, loading, putting, run)
        if isinstance(engine, str):
            network, tokenizer = run.load(model, loading)
        elif size != "auto":
            raise InputError("--batch-size has no effect with this engine; leave it out")
        if network is not None and loaded is not None:
            loaded.fold_into(network)
        work = None
        if out is not None:
            unfinished = Unfinished(beside(out), restart=writing.restart, warn=run.warn)
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
            engine=engine,
            system=putting.system if isinstance(engine, str) else None,
            template_kwargs=switches if isinstance(engine, str) else None,
            batch_size=size,
            progress=run.progress,
            warn=run.warn,
            work=work,
            **asdict(settings),
        )
        written = [] if out is None else [report.save(out, overwrite=writing.overwrite)]
    failures = [said for said in (one.failure(report) for one in gates) if said]
    run.result(
        {**report.to_json(), "gates_failed": failures},
        eval_table(report),
        *(f"wrote {path}" for path in written),
    )
    if failures:
        for said in failures:
            say(said)
        raise SystemExit(EXIT_GATE_FAILED)
