"""Neuron-selective safety tuning of language models.

    import nest
    model, tokenizer = nest.load("path-or-name")
    selection = nest.select(model, tokenizer, unsafe=[...], safe=[...], z_threshold=3.0)
    patch = nest.tune(model, tokenizer, selection, harmful=[...], benign=[...])
    report = nest.evaluate(model, tokenizer, harmful=[...], borderline=[...], benign=[...])

Names are imported when they are first used, so that importing `nest` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nest.version import __version__

if TYPE_CHECKING:
    from nest.activations.steering import ablating, adding
    from nest.api import compare, evaluate, fold, load, revert, select, tune, tune_result, verify
    from nest.conversations.conversation import Conversation, Turn
    from nest.conversations.encoders import CallableEncoder, ChatEncoder
    from nest.errors import (
        ActivationError,
        EngineError,
        InputError,
        LayoutError,
        MissingInputError,
        NestError,
        NoImprovementError,
        NoMemoryError,
        OutputExistsError,
        PatchError,
        SelectionError,
        TuningStoppedError,
    )
    from nest.evaluation.report import EvalReport
    from nest.generation.sampling import Sampling
    from nest.generation.scripted import ScriptedEngine
    from nest.generation.server import ServerEngine
    from nest.generation.static import StaticEngine
    from nest.judging.judge import Exchange, Judgement, Verdict
    from nest.models.layouts import find_sites
    from nest.models.sites import NeuronSite
    from nest.patches.patch import NeuronPatch
    from nest.selection.selection import NeuronSelection, SiteSelection
    from nest.tuning.optimizer import NeuronAdamW
    from nest.tuning.update import ClusterUpdate, trainable

_HOMES = {
    "nest.conversations.conversation": ("Conversation", "Turn"),
    "nest.generation.sampling": ("Sampling",),
    "nest.generation.static": ("StaticEngine",),
    "nest.generation.server": ("ServerEngine",),
    "nest.generation.scripted": ("ScriptedEngine",),
    "nest.judging.judge": (
        "Exchange",
        "Judgement",
        "Verdict",
    ),
    "nest.activations.steering": (
        "ablating",
        "adding",
    ),
    "nest.api": (
        "compare",
        "evaluate",
        "fold",
        "load",
        "revert",
        "select",
        "tune",
        "tune_result",
        "verify",
    ),
    "nest.errors": (
        "ActivationError",
        "EngineError",
        "InputError",
        "LayoutError",
        "MissingInputError",
        "NestError",
        "NoImprovementError",
        "NoMemoryError",
        "OutputExistsError",
        "PatchError",
        "SelectionError",
        "TuningStoppedError",
    ),
    "nest.evaluation.report": ("EvalReport",),
    "nest.conversations.encoders": ("CallableEncoder", "ChatEncoder"),
    "nest.models.layouts": ("find_sites",),
    "nest.models.sites": ("NeuronSite",),
    "nest.patches.patch": ("NeuronPatch",),
    "nest.selection.selection": ("NeuronSelection", "SiteSelection"),
    "nest.tuning.optimizer": ("NeuronAdamW",),
    "nest.tuning.update": ("ClusterUpdate", "trainable"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ActivationError",
    "CallableEncoder",
    "ChatEncoder",
    "ClusterUpdate",
    "Conversation",
    "EngineError",
    "EvalReport",
    "Exchange",
    "InputError",
    "Judgement",
    "LayoutError",
    "MissingInputError",
    "NestError",
    "NeuronAdamW",
    "NeuronPatch",
    "NeuronSelection",
    "NeuronSite",
    "NoImprovementError",
    "NoMemoryError",
    "OutputExistsError",
    "PatchError",
    "Sampling",
    "ScriptedEngine",
    "SelectionError",
    "ServerEngine",
    "SiteSelection",
    "StaticEngine",
    "TuningStoppedError",
    "Turn",
    "Verdict",
    "__version__",
    "ablating",
    "adding",
    "compare",
    "evaluate",
    "find_sites",
    "fold",
    "load",
    "revert",
    "select",
    "trainable",
    "tune",
    "tune_result",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'nest' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
