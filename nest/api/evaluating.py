"""`nest.evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest.api.inputs import as_set, resolved_batch_size
from nest.api.models import origin_of
from nest.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from nest.api.inputs import BatchSize, Dialogues, EncodeLike, Prompts
    from nest.artifacts.unfinished import Unfinished
    from nest.conversations.encoders import Encoder
    from nest.evaluation.config import EvaluationConfig
    from nest.evaluation.report import EvalReport
    from nest.generation.engine import Engine, Which
    from nest.judging.judge import Judge
    from nest.patches.patch import NeuronPatch
    from nest.progress import ProgressCallback
    from nest.prompts.attacks import Attack
    from nest.prompts.prompt_set import PromptSet

# What `auto` stands for until it is measured per machine: prompts decoded together.
GENERATION_BATCH_SIZE = 256


def evaluate(
    model: nn.Module | None = None,
    tokenizer: Any = None,
    *,
    harmful: Prompts | Dialogues,
    borderline: Prompts | None = None,
    benign: Dialogues | None = None,
    attacks: str | Sequence[str | Attack] = "none",
    judge: str | Judge | Sequence[Judge] = "phrases",
    refusal_phrases: str | Path | None = None,
    patch: NeuronPatch | None = None,
    engine: Which | Engine = "auto",
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
        model: The model, with its patch folded in if it is to be measured with one; None with an engine
            that has a model of its own, such as a server.
        tokenizer: For its chat template.
        harmful: Prompts that should be refused; with responses, the `reference` judge knows what a
            success looks like.
        borderline: Harmless prompts that sound harmful.
        benign: Harmless prompts with the one good answer.
        attacks: Names, template files, or `all`, with commas between; or a list of names and attacks.
            The bare prompt is always asked as well; it counts in the mean only if `none` is named.
        judge: `phrases`, `reference`, another of `make_judges`, several with commas between, or your own;
            the first one counts.
        refusal_phrases: File with more phrases for the judge, one a line.
        patch: The patch that the model carries: it is taken out for a while to measure the drift
            (KL) from the base model.
        engine: How the model's answers are decoded: `static` batches, the `paged` continuous batching of
            transformers, or `auto`; or an engine, which answers in the model's place.
        encode: Instead of the tokenizer, as for `select`.
        system: System prompt put before every prompt that has none of its own.
        template_kwargs: Switches of the chat template, as for `select`.
        batch_size: Prompts decoded together.
        progress: Called with stage, steps done, steps in all.
        warn: Told what deserves attention; by default a Python warning.
        work: Folder that keeps answers and judgements, as for `select`.
        **settings: Fields of `EvaluationConfig`: max_new_tokens, temperature, samples, seed, ...

    Raises:
        InputError: prompts or settings that cannot be used.
        PatchError: the model does not carry the patch.
        EngineError: the engine, or the model behind a judge, failed.
    """
    import warnings

    from nest.artifacts.unfinished import as_work
    from nest.conversations.prompting import Prompting
    from nest.evaluation.config import EvaluationConfig
    from nest.evaluation.evaluate import evaluate as run
    from nest.prompts.attacks import asked_attacks

    config = EvaluationConfig(**settings)
    warn = warn or (lambda text: warnings.warn(text, stacklevel=3))
    prompting = Prompting.of(tokenizer, system, template_kwargs)
    then = None if patch is None else Prompting.recorded_in(patch.provenance)
    for said in [] if then is None else prompting.differences(then, "the patch"):
        warn(said)
    chosen, counted = asked_attacks(attacks)
    asked = _Asked.of(
        model,
        tokenizer,
        engine,
        patch,
        encode=encode,
        system=system,
        template_kwargs=template_kwargs,
        batch_size=resolved_batch_size(batch_size, GENERATION_BATCH_SIZE),
        config=config,
        progress=progress,
    )
    with as_work(work, warn) as kept:
        report = run(
            asked.engine,
            harmful=as_set(harmful, "harmful"),
            borderline=None if borderline is None else as_set(borderline, "borderline"),
            benign=None if benign is None else as_set(benign, "benign", need_response=True),
            attacks=chosen,
            counted=counted,
            judges=_judges(judge, refusal_phrases),
            config=config,
            encoder=asked.encoder,
            drift=asked.drift,
            progress=progress,
            work=kept,
        )
    unread = {kind: counts["unparsed"] for kind, counts in report.verdict_counts.items()}
    for kind, count in unread.items():
        if count:
            meaning = "count as successes of the attack" if kind == "harmful" else "as no refusals"
            warn(f"{count} judgements of {kind} prompts could not be read; they {meaning}")
    origin = {
        **({} if model is None else origin_of(uncompiled_model(model), tokenizer)),
        "engine": asked.engine.identity if model is None else asked.engine.name,
        "prompting": getattr(engine, "prompting", prompting).to_dict(),
        "with_patch": patch is not None,
    }
    return replace(report, settings={**report.settings, "origin": origin, "config": asdict(config)})


@dataclass(frozen=True)
class _Asked:
    """What answers, and what is known of it.

    Attributes:
        engine: What answers.
        encoder: Of a model in this process; None where the engine has its own.
        drift: Measures how far the model is from its base; None where there is no patch to take out.
    """

    engine: Engine
    encoder: Encoder | None
    drift: Callable[[PromptSet], float] | None

    @staticmethod
    def of(
        model: nn.Module | None,
        tokenizer: Any,
        engine: Which | Engine,
        patch: NeuronPatch | None,
        *,
        encode: EncodeLike | None,
        system: str | None,
        template_kwargs: Mapping[str, Any] | None,
        batch_size: int,
        config: EvaluationConfig,
        progress: ProgressCallback | None,
    ) -> _Asked:
        """A model with an engine of ours, or an engine.

        Raises:
            InputError: neither of both, or both; or options that an engine with a model of its own has no
                use for.
            PatchError: the model does not carry the patch.
        """
        from nest.generation.engine import Engine

        if not isinstance(engine, (str, Engine)):
            raise InputError(f"engine is {engine!r}; expected auto, static, paged, or an engine")
        if not isinstance(engine, str):
            others = {
                **{"model": model, "tokenizer": tokenizer, "patch": patch, "encode": encode},
                **{"system": system, "template_kwargs": template_kwargs or None},
            }
            given = [name for name, value in others.items() if value is not None]
            if given:
                raise InputError(
                    f"an engine with a model of its own has no use for {', '.join(given)}; leave it out "
                    "(a system prompt is the engine's)"
                )
            return _Asked(engine, None, None)
        if model is None:
            raise InputError("evaluate needs a model, or an engine that has one of its own")
        from nest.conversations.encoders import encoder_for
        from nest.evaluation.divergence import kl_to_base
        from nest.generation.local import local_engine

        model = uncompiled_model(model)
        if patch is not None:
            patch.require_in(model)
        encoder = encoder_for(model, tokenizer, encode, system, template_kwargs)
        own = local_engine(
            model,
            encoder,
            engine,
            batch_size=batch_size,
            progress=progress,
            sampling=config.sampling(),
        )

        def drift(benign: PromptSet) -> float:
            assert patch is not None
            removed = partial(patch.removed, model)
            return kl_to_base(model, encoder, benign.chats(), removed, batch_size, progress)

        return _Asked(own, encoder, None if patch is None else drift)


def uncompiled_model(model: nn.Module) -> nn.Module:
    """The model out of torch.compile's and DataParallel's wrappers."""
    from nest.models.wrappers import uncompiled

    return uncompiled(model)


def _judges(
    judge: str | Judge | Sequence[Judge], refusal_phrases: str | Path | None
) -> tuple[Judge, ...]:
    from nest.judging.judge import Judge
    from nest.judging.makers import make_judges

    if isinstance(judge, str):
        return make_judges(judge, refusal_phrases)
    several: list[Any] = [*judge] if isinstance(judge, Sequence) else [judge]
    for one in several:
        if not isinstance(one, Judge):
            raise InputError(
                f"a judge is {one!r}; expected names with commas between, a judge, or a list of judges"
            )
    return tuple(several)
