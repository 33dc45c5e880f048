"""`nest.select`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest.api.inputs import as_set, both_kinds, resolved_batch_size
from nest.api.models import origin_of
from nest.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from nest.api.inputs import BatchSize, Dialogues, EncodeLike, Prompts
    from nest.artifacts.unfinished import Unfinished
    from nest.models.sites import NeuronSite
    from nest.progress import ProgressCallback
    from nest.prompts.prompt_set import PromptSet
    from nest.selection.selection import NeuronSelection

# What `auto` stands for until it is measured per machine: prompts a forward pass.
CAPTURE_BATCH_SIZE = 32


def select(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    unsafe: Prompts | None = None,
    safe: Prompts | None = None,
    pairs: str | Path | Sequence[tuple[str, str]] | None = None,
    harmful: Dialogues | None = None,
    benign: Dialogues | None = None,
    layout: Sequence[NeuronSite] | None = None,
    encode: EncodeLike | None = None,
    system: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    check_refusals: bool = True,
    refusal_phrases: str | Path | None = None,
    batch_size: BatchSize = "auto",
    progress: ProgressCallback | None = None,
    warn: Callable[[str], None] | None = None,
    provenance: Mapping[str, Any] | None = None,
    work: str | Path | Unfinished | None = None,
    **settings: Any,
) -> NeuronSelection:
    """Find the neurons that refusal hangs on, and group them.

        selection = nest.select(model, tokenizer, harmful=[(prompt, refusal), ...],
                                benign=[(prompt, answer), ...])
        selection = nest.select(model, tokenizer, unsafe=[...], safe=[...], z_threshold=3.0)    # by probe

    Args:
        model: Any `nn.Module`; a transformers model needs nothing else but its tokenizer.
        tokenizer: For its chat template.
        unsafe: Prompts to be refused: a file, a named set, or strings.
        safe: Prompts to be answered, about as many.
        pairs: Instead of both: matched (unsafe, safe) pairs, or a file with these two columns.
        harmful: Prompts with the refusals to give, for the scorers effect, gradient and learned; without
            `unsafe` their prompts are taken for those, by any scorer.
        benign: Prompts with their good answers, likewise.
        layout: Where a custom model's neurons are.
        encode: Instead of the tokenizer: text to token ids, or an `Encoder`.
        system: System prompt put before every prompt that has none of its own.
        template_kwargs: Switches of the chat template, such as `{"enable_thinking": False}`.
        check_refusals: Refuse harmful dialogues that mostly comply, and benign ones that mostly refuse.
        refusal_phrases: File with more phrases to know a refusal by, one a line.
        batch_size: Prompts a forward pass.
        progress: Called with stage, steps done, steps in all.
        warn: Told about sites without neurons; by default a Python warning.
        provenance: Added to the selection's.
        work: Folder that keeps what is done so far: should the process end, the same call with the same
            folder goes on from there. It is gone when the call returns.
        **settings: Fields of `SelectionConfig`: z_threshold, neurons, pool, scorer, cluster_scope,
            max_clusters, n_probe_seeds, seed, ...

    Raises:
        InputError: prompts or settings that cannot be used.
        LayoutError: a model whose neurons cannot be found.
        ActivationError: NaN or infinite activations.
        SelectionError: no neuron passes the threshold.
    """
    import warnings

    from nest.artifacts.unfinished import as_work
    from nest.conversations.encoders import encoder_for
    from nest.conversations.prompting import Prompting
    from nest.judging.phrases import phrase_judge
    from nest.judging.refusals import check_responses
    from nest.models.layouts import find_sites
    from nest.models.wrappers import uncompiled
    from nest.scoring.find import find_neurons
    from nest.selection.config import LEARNING, SelectionConfig

    if (harmful is None) != (benign is None):
        raise InputError(
            "dialogues come in two kinds: give harmful prompts with refusals (--harmful) and benign ones "
            "with good answers (--benign), or none of both"
        )
    both = harmful is not None
    config = SelectionConfig(**settings).resolved(dialogues=both)
    model = uncompiled(model)
    unsafe_set: PromptSet | None
    safe_set: PromptSet | None
    learns = config.scorer in LEARNING
    has_prompts = unsafe is not None or safe is not None or pairs is not None
    if not learns and both and has_prompts:
        raise InputError(
            f"the scorer {config.scorer} learns from prompts alone; give --unsafe and --safe, or --harmful "
            f"and --benign whose prompts are then taken, and not both; or take one of {', '.join(LEARNING)}"
        )
    refusals = None if harmful is None else as_set(harmful, "harmful", need_response=True)
    answers = None if benign is None else as_set(benign, "benign", need_response=True)
    if both and not has_prompts:
        unsafe_set, safe_set = refusals, answers
    else:
        unsafe_set, safe_set = both_kinds(unsafe, safe, pairs)
    warn = warn or (lambda text: warnings.warn(text, stacklevel=3))
    if check_refusals and refusals is not None and answers is not None:
        check_responses(
            refusals,
            answers,
            phrase_judge(refusal_phrases),
            source=harmful if isinstance(harmful, (str, Path)) else None,
            warn=warn,
        )
    with as_work(work, warn) as kept:
        selection = find_neurons(
            model,
            encoder_for(model, tokenizer, encode, system, template_kwargs),
            sites=find_sites(model, layout),
            config=config,
            unsafe=unsafe_set,
            safe=safe_set,
            harmful=refusals,
            benign=answers,
            paired=pairs is not None,
            batch_size=resolved_batch_size(batch_size, CAPTURE_BATCH_SIZE),
            progress=progress,
            warn=warn,
            work=kept,
        )
    origin = {**origin_of(model, tokenizer), **(provenance or {})}
    prompting = Prompting.of(tokenizer, system, template_kwargs).to_dict()
    return replace(selection, provenance={**origin, **selection.provenance, "prompting": prompting})
