"""What an evaluation needs to know, besides the model and the prompts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nest.errors import InputError


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of `evaluate`; all faults are reported together.

    Attributes:
        attacks: Names, template files or `all`, with commas between them.
        judge: `phrases` or `reference`.
        refusal_phrases: File with further refusal phrases for the judge, one a line.
        max_new_tokens: Longest answer, in tokens. Attack success rises with it.
        batch_size: Most prompts decoded together.
        seed: Of the bootstrap behind the mean's interval; decoding is greedy and needs none.
        bootstrap_resamples: Samples of that bootstrap.
        benign_twin_prompts: At most how many harmless prompts are put through every attack, to tell
            safety from incapability; 0 leaves the benign twin out.
    """

    attacks: str = "none"
    judge: str = "phrases"
    refusal_phrases: str | None = None
    max_new_tokens: int = 256
    batch_size: int = 256
    seed: int = 0
    bootstrap_resamples: int = 2000
    benign_twin_prompts: int = 50

    def __post_init__(self) -> None:
        least = {
            "max_new_tokens": 1,
            "batch_size": 1,
            "seed": 0,
            "bootstrap_resamples": 100,
            "benign_twin_prompts": 0,
        }
        faults = [
            f"{name} is {getattr(self, name)}; expected at least {bound}"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]
        if self.judge not in ("phrases", "reference"):
            faults.append(f"judge is {self.judge!r}; expected phrases or reference")
        if faults:
            raise InputError("evaluation settings: " + "; ".join(faults))

    def to_json(self) -> dict[str, Any]:
        """Plain values for a report."""
        return asdict(self)
