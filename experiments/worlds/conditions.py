"""The rows of the comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# The bazaar has 384 neurons a projection and the harbour as many; only z may differ between worlds.
Z_THRESHOLDS = {"bazaar": 2.0, "harbour": 2.0}
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Condition:
    """One way to train on a world.

    Attributes:
        name: Key in the results.
        label: Row of the table.
        kind: `nest`: a cluster update; `lora`: PEFT's adapter on the same modules.
        selection: `probe`: as selected; `random`: as many neurons drawn at random.
        harmful: Set of harmful dialogues: with half of the wrappers, or plain (`harmful_vanilla`).
        rank: Of the adapter.
        settings: Fields of `TuningConfig` that differ from the defaults.
    """

    name: str
    label: str
    kind: Literal["nest", "lora"] = "nest"
    selection: Literal["probe", "random"] = "probe"
    harmful: str = "harmful"
    rank: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


CONDITIONS = (
    Condition("shared", "shared (the paper's form)", settings={"update": "shared"}),
    Condition("loaded", "loaded", settings={"update": "loaded"}),
    Condition(
        "shared_random",
        "shared, random neurons",
        selection="random",
        settings={"update": "shared"},
    ),
    Condition(
        "loaded_random",
        "loaded, random neurons",
        selection="random",
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
    Condition("lora", "LoRA rank 1, same modules", kind="lora", rank=1),
)
