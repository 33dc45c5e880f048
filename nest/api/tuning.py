"""`nest.tune`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nest.api.inputs import as_set
from nest.api.models import origin_of
from nest.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from nest.api.inputs import Dialogues, EncodeLike
    from nest.artifacts.unfinished import Unfinished
    from nest.patches.patch import NeuronPatch
    from nest.progress import ProgressCallback
    from nest.selection.selection import NeuronSelection
    from nest.tuning.tune import TuningResult


def tune(
    model: nn.Module,
    tokenizer: Any = None,
    selection: NeuronSelection | None = None,
    *,
    harmful: Dialogues,
    benign: Dialogues,
    n_clusters: int | Literal["auto"] | None = None,
    encode: EncodeLike | None = None,
    system: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    check_refusals: bool = True,
    refusal_phrases: str | Path | None = None,
    progress: ProgressCallback | None = None,
    provenance: Mapping[str, Any] | None = None,
    work: str | Path | Unfinished | None = None,
    checkpoint_every: str = "60s",
    **settings: Any,
) -> NeuronPatch:
    """Train the selection's cluster update; the model carries it afterwards.

        patch = nest.tune(model, tokenizer, selection, harmful=[(prompt, refusal), ...],
                          benign=[(prompt, answer), ...])
        patch.revert(model)     # takes it out, to the last bit

    Args:
        model: The model that the selection was made on.
        tokenizer: For its chat template.
        selection: From `nest.select`, `NeuronSelection.load` or `NeuronSelection.of`.
        harmful: Prompts with the refusals to give.
        benign: Prompts with their good answers.
        n_clusters: Cluster the neurons anew: a number a site, or `auto` for the best silhouette.
        encode: Instead of the tokenizer, as for `select`.
        system: System prompt put before every prompt that has none of its own.
        template_kwargs: Switches of the chat template, as for `select`.
        check_refusals: Refuse harmful dialogues that mostly comply, and benign ones that mostly refuse.
        refusal_phrases: File with more phrases to know a refusal by, one a line.
        progress: Called with stage, steps done, steps in all.
        provenance: Added to the patch's.
        work: Folder for a checkpoint: should the process end, the same call with the same folder goes on
            from it, to the same patch. It is gone when the call returns.
        checkpoint_every: How often one is written: a time (`60s`, `5m`), a number of steps, or `never`.
        **settings: Fields of `TuningConfig`: update, epochs, learning_rate, batch_size, kl_weight,
            seed, ...

    Returns:
        The patch of the best step; `tune_result` gives the loss curve with it.

    Raises:
        InputError: dialogues or settings that cannot be used; a `NoImprovementError` where no step
            lowered the validation loss.
        SelectionError: the selection is of another model.
        ActivationError: the loss or a gradient is not a finite number. Where steps before that were
            good it is a `TuningStoppedError`, whose `result.patch` is that of the best of them.
    """
    result = tune_result(
        model,
        tokenizer,
        selection,
        harmful=harmful,
        benign=benign,
        n_clusters=n_clusters,
        encode=encode,
        system=system,
        template_kwargs=template_kwargs,
        check_refusals=check_refusals,
        refusal_phrases=refusal_phrases,
        progress=progress,
        provenance=provenance,
        work=work,
        checkpoint_every=checkpoint_every,
        **settings,
    )
    result.patch.fold_into(model)
    return result.patch


def tune_result(
    model: nn.Module,
    tokenizer: Any = None,
    selection: NeuronSelection | None = None,
    *,
    harmful: Dialogues,
    benign: Dialogues,
    n_clusters: int | Literal["auto"] | None = None,
    encode: EncodeLike | None = None,
    system: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    check_refusals: bool = True,
    refusal_phrases: str | Path | None = None,
    progress: ProgressCallback | None = None,
    notice: Callable[[str], None] | None = None,
    warn: Callable[[str], None] | None = None,
    provenance: Mapping[str, Any] | None = None,
    work: str | Path | Unfinished | None = None,
    checkpoint_every: str = "60s",
    **settings: Any,
) -> TuningResult:
    """As `tune`, but the model is left as it was, and the loss curve and timings come along.

    Args that `tune` does not have:
        notice: Told how many responses are refusals, and the memory that will be needed.
        warn: Told what deserves attention; by default a Python warning.
    """
    import warnings

    from nest.artifacts.unfinished import as_work
    from nest.conversations.encoders import encoder_for
    from nest.conversations.prompting import Prompting
    from nest.judging.phrases import phrase_judge
    from nest.judging.refusals import check_responses
    from nest.models.wrappers import uncompiled
    from nest.selection.select import reclustered
    from nest.tuning.checkpoints import Every
    from nest.tuning.config import TuningConfig
    from nest.tuning.tune import tune_update

    config = TuningConfig(**settings)
    model = uncompiled(model)
    warn = warn or (lambda text: warnings.warn(text, stacklevel=3))
    if selection is None:
        raise InputError("tune needs a selection; make one with nest.select(...)")
    prompting = Prompting.of(tokenizer, system, template_kwargs)
    then = Prompting.recorded_in(selection.provenance)
    for said in [] if then is None else prompting.differences(then, "the selection"):
        warn(said)
    if n_clusters is not None:
        wanted = None if n_clusters == "auto" else n_clusters
        selection = reclustered(selection, wanted, seed=config.seed)
    refusals = as_set(harmful, "harmful", need_response=True)
    answers = as_set(benign, "benign", need_response=True)
    if check_refusals:
        check_responses(
            refusals,
            answers,
            phrase_judge(refusal_phrases),
            source=harmful if isinstance(harmful, (str, Path)) else None,
            notice=notice,
            warn=warn,
        )
    with as_work(work, warn) as kept:
        return tune_update(
            model,
            encoder_for(model, tokenizer, encode, system, template_kwargs),
            selection,
            harmful=refusals,
            benign=answers,
            config=config,
            provenance={
                **origin_of(model, tokenizer),
                **(provenance or {}),
                "prompting": prompting.to_dict(),
            },
            progress=progress,
            notice=notice,
            warn=warn,
            work=kept,
            checkpoint_every=Every.parse(checkpoint_every),
        )
