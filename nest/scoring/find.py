"""The selection stage with every scorer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from nest.artifacts.unfinished import Unfinished
from nest.conversations.encoders import Encoder
from nest.errors import InputError
from nest.models.sites import NeuronSite
from nest.progress import ProgressCallback
from nest.prompts.prompt_set import PromptSet
from nest.scoring.rankers import ByEffect, ByGradient, ByLearning
from nest.selection.choosing import Ranker
from nest.selection.config import LEARNING, Control, Scorer, SelectionConfig
from nest.selection.select import select_neurons
from nest.selection.selection import NeuronSelection
from nest.tuning.config import TuningConfig

RANKERS: Mapping[Scorer, Callable[..., Ranker]] = {
    "effect": ByEffect,
    "gradient": ByGradient,
    "learned": ByLearning,
}


def find_neurons(
    model: nn.Module,
    encoder: Encoder,
    *,
    sites: Sequence[NeuronSite],
    config: SelectionConfig,
    unsafe: PromptSet | None = None,
    safe: PromptSet | None = None,
    harmful: PromptSet | None = None,
    benign: PromptSet | None = None,
    tuning: TuningConfig | None = None,
    control: Control | None = None,
    paired: bool = False,
    batch_size: int = 32,
    progress: ProgressCallback | None = None,
    warn: Callable[[str], None] | None = None,
    work: Unfinished | None = None,
) -> NeuronSelection:
    """Find the neurons that refusal hangs on, and group them.

    Args:
        model: The model; left as it was.
        encoder: Turns prompts and dialogues into tokens.
        sites: Where to look.
        config: How.
        unsafe: Prompts that should be refused; by default those of `harmful`.
        safe: Prompts that should be answered; by default those of `benign`.
        harmful: Prompts with the refusals to give, for scorers that learn.
        benign: Prompts with their good answers, for scorers that learn.
        tuning: What is to follow, for scorers that learn; its rate, steps and form play no part.
        control: See `select_neurons`.
        paired: See `select_neurons`.
        batch_size: Prompts a forward pass.
        progress: Called with stage, steps done, steps in all.
        warn: Told what deserves attention.
        work: Keeps activations and scores, so that a later run goes on from there; training begins anew.

    Raises:
        InputError: prompts or dialogues that the scorer needs are missing, or cannot be used.
        ActivationError: activations, gradients or losses that are not finite.
        SelectionError: nothing is left to be kept.
    """
    config = config.resolved(dialogues=harmful is not None and benign is not None)
    ranker: Ranker | None = None
    assert config.scorer is not None
    if config.scorer in LEARNING:
        if harmful is None or benign is None:
            raise InputError(
                f"the scorer {config.scorer} learns from dialogues: give harmful prompts with refusals "
                "(--harmful) and benign ones with good answers (--benign), or take --scorer probe"
            )
        ranker = RANKERS[config.scorer](
            model,
            encoder,
            harmful,
            benign,
            config,
            tuning or TuningConfig(),
            progress,
            warn or _say_nothing,
        )
    if unsafe is None and safe is None:
        unsafe, safe = harmful, benign
    if unsafe is None or safe is None:
        raise InputError(
            "select needs unsafe and safe prompts (--unsafe and --safe), or pairs of them (--pairs)"
        )
    selection = select_neurons(
        model,
        encoder,
        unsafe=unsafe,
        safe=safe,
        sites=sites,
        config=config,
        paired=paired,
        batch_size=batch_size,
        control=control,
        ranker=ranker,
        progress=progress,
        warn=warn,
        work=work,
    )
    if ranker is None:
        return selection
    sets = {"harmful": harmful, "benign": benign}
    dialogues = {name: one.to_manifest() for name, one in sets.items() if one is not None}
    return replace(selection, provenance={**selection.provenance, "dialogues": dialogues})


def _say_nothing(_text: str) -> None:
    return
