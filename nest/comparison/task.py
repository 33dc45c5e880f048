"""One run of a comparison: which arm, on which world, with which seed, and what it found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Stage = Literal["base", "sweep", "main", "front", "anytime", "robustness"]


@dataclass(frozen=True)
class Task:
    """What one worker does at a time.

    Attributes:
        stage: What for.
        world: On which.
        arm: Which; empty for the model as it is.
        seed: Of selection and training.
        knob: The arm's learning rate or strength; None takes its method's own.
        weight: What the weights of benign answers are multiplied with.
        split: What it is measured on.
    """

    stage: Stage
    world: str
    arm: str = ""
    seed: int = 0
    knob: float | None = None
    weight: float = 1.0
    split: Literal["development", "test"] = "development"

    @property
    def name(self) -> str:
        """In words, the same in every comparison that has this run."""
        parts = [self.stage, self.world, self.arm or "as it is", f"seed {self.seed}", self.split]
        if self.stage == "sweep":
            parts.append(f"setting {self.knob:g}")
        if self.weight != 1.0:
            parts.append(f"weight {self.weight:g}")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Outcome:
    """What a run found.

    Attributes:
        figures: What depends on the run alone: the same machine finds the same again.
        cost: What was measured of the machine: seconds, peak memory.
        failed: Why there are no figures: one sentence; None where there are.
        warnings: What deserves attention.
    """

    figures: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)
    failed: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def is_unimproved(self) -> bool:
        """Whether it trained and no step was better than none: its figures are the untreated model's."""
        return bool(self.figures.get("steps")) and self.figures.get("best_step") == 0

    def to_json(self) -> dict[str, Any]:
        return {
            "figures": dict(self.figures),
            "cost": dict(self.cost),
            "failed": self.failed,
            "warnings": list(self.warnings),
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Outcome:
        return Outcome(
            values["figures"], values["cost"], values["failed"], tuple(values["warnings"])
        )


def key_of(specification: Mapping[str, Any]) -> str:
    """sha256 of all that a run depends on."""
    text = json.dumps(specification, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
