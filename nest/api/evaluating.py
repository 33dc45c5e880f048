"""`nest.evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest.api.inputs import as_set, resolved_batch_size
from nest.api.models import origin_of

if TYPE_CHECKING:
    from torch import nn

    from nest.api.inputs import BatchSize, Dialogues, EncodeLike, Prompts
    from nest.artifacts.unfinished import Unfinished
    from nest.evaluation.report import EvalReport
    from nest.judging.judge import Judge
    from nest.patches.patch import NeuronPatch
    from nest.progress import ProgressCallback
    from nest.prompts.attacks import Attack

# What `auto` stands for until it is measured per machine: prompts decoded together.
GENERATION_BATCH_SIZE = 256


def evaluate(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    harmful: Prompts | Dialogues,
    borderline: Prompts | None = None,
    benign: Dialogues | None = None,
    attacks: str | Sequence[str | Attack] = "none",
    judge: str | Judge = "phrases",
    refusal_phrases: str | Path | None = None,
    patch: NeuronPatch | None = None,
    encode: EncodeLike | None = None,
    system: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    batch_size: BatchSize = "auto",
    progress: ProgressCallback | None = None,
    warn: Callable[[str], None] | None = None,
    work: str | Path | Unfinished | None = None,
    **settings: Any,
) -> EvalReport:
    """Measure attack success, over-refusal and usefulness of a model as it is.

    Args:
        model: The model, with its patch folded in if it is to be measured with one.
        tokenizer: For its chat template.
        harmful: Prompts that should be refused; with responses, the `reference` judge knows what a
            success looks like.
        borderline: Harmless prompts that sound harmful.
        benign: Harmless prompts with the one good answer.
        attacks: Names, template files, or `all`, with commas between; or a list of names and attacks.
            The bare prompt is always asked as well; it counts in the mean only if `none` is named.
        judge: `phrases`, `reference`, or your own.
        refusal_phrases: File with more phrases for the judge, one a line.
        patch: The patch that the model carries: it is taken out for a while to measure the drift
            (KL) from the base model.
        encode: Instead of the tokenizer, as for `select`.
        system: System prompt put before every prompt that has none of its own.
        template_kwargs: Switches of the chat template, as for `select`.
        batch_size: Prompts decoded together.
        progress: Called with stage, steps done, steps in all.
        warn: Told what deserves attention; by default a Python warning.
        work: Folder that keeps answers and verdicts, as for `select`.
        **settings: Fields of `EvaluationConfig`: max_new_tokens, seed, bootstrap_resamples,
            benign_twin_prompts, engine.

    Raises:
        InputError: prompts or settings that cannot be used.
        PatchError: the model does not carry the patch.
    """
    import warnings

    from nest.artifacts.unfinished import as_work
    from nest.conversations.encoders import encoder_for
    from nest.conversations.prompting import Prompting
    from nest.evaluation.config import EvaluationConfig
    from nest.evaluation.evaluate import evaluate as run
    from nest.judging.makers import make_judge
    from nest.models.wrappers import uncompiled
    from nest.prompts.attacks import resolve_attacks

    config = EvaluationConfig(**settings)
    model = uncompiled(model)
    warn = warn or (lambda text: warnings.warn(text, stacklevel=3))
    prompting = Prompting.of(tokenizer, system, template_kwargs)
    then = None if patch is None else Prompting.recorded_in(patch.provenance)
    for said in [] if then is None else prompting.differences(then, "the patch"):
        warn(said)
    if patch is not None:
        patch.require_in(model)
    chosen = resolve_attacks(attacks)
    items: list[str | Attack] = list(attacks.split(",") if isinstance(attacks, str) else attacks)
    asked = {item.strip() if isinstance(item, str) else item.name for item in items}
    bare = bool({"none", "all"} & asked) or len(chosen) == 1
    counted = [attack.name for attack in chosen if bare or attack.name != "none"]
    with as_work(work, warn) as kept:
        report = run(
            model,
            encoder_for(model, tokenizer, encode, system, template_kwargs),
            harmful=as_set(harmful, "harmful"),
            borderline=None if borderline is None else as_set(borderline, "borderline"),
            benign=None if benign is None else as_set(benign, "benign", need_response=True),
            attacks=chosen,
            counted=counted,
            judge=make_judge(judge, refusal_phrases) if isinstance(judge, str) else judge,
            removed=None if patch is None else lambda: patch.removed(model),
            max_new_tokens=config.max_new_tokens,
            batch_size=resolved_batch_size(batch_size, GENERATION_BATCH_SIZE),
            seed=config.seed,
            bootstrap_resamples=config.bootstrap_resamples,
            benign_twin_prompts=config.benign_twin_prompts,
            engine=config.engine,
            progress=progress,
            work=kept,
        )
    origin = {
        **origin_of(model, tokenizer),
        "prompting": prompting.to_dict(),
        "with_patch": patch is not None,
    }
    return replace(report, settings={**report.settings, "origin": origin, "config": asdict(config)})
