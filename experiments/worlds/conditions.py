"""The rows of the comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from nest.selection.config import Control

# The only setting that differs between the worlds. A tiny model has few neurons a projection (384), so
# that the paper's 3 would leave next to none.
Z_THRESHOLDS = {"bazaar": 1.5, "harbour": 0.5}
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Condition:
    """One way to train on a world.

    Attributes:
        name: Key in the results.
        label: Row of the table.
        kind: `nest`: a cluster update; `lora`: PEFT's adapter on the same modules.
        control: Of the selection; None trains it as it is.
        harmful: Set of harmful dialogues: with half of the wrappers, or plain (`harmful_vanilla`).
        rank: Of the adapter.
        settings: Fields of `TuningConfig` that differ from the defaults.
    """

    name: str
    label: str
    kind: Literal["nest", "lora"] = "nest"
    control: Control | None = None
    harmful: str = "harmful"
    rank: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


CONDITIONS = (
    Condition("shared", "shared (the paper's form)", settings={"update": "shared"}),
    Condition("loaded", "loaded", settings={"update": "loaded"}),
    Condition(
        "shared_random",
        "shared, random neurons",
        control="random_neurons",
        settings={"update": "shared"},
    ),
    Condition(
        "loaded_random",
        "loaded, random neurons",
        control="random_neurons",
        settings={"update": "loaded"},
    ),
    Condition(
        "shared_vanilla",
        "shared, plain harmful prompts only",
        harmful="harmful_vanilla",
        settings={"update": "shared"},
    ),
    Condition(
        "loaded_vanilla",
        "loaded, plain harmful prompts only",
        harmful="harmful_vanilla",
        settings={"update": "loaded"},
    ),
    Condition(
        "loaded_random_clusters",
        "loaded, random clusters",
        control="random_clusters",
        settings={"update": "loaded"},
    ),
    Condition("loaded_no_kl", "loaded, without the KL term", settings={"kl_weight": 0.0}),
    Condition("lora", "LoRA rank 1, same modules", kind="lora", rank=1),
)
