"""What an evaluation needs to know, besides the model and the prompts."""

from __future__ import annotations

from dataclasses import dataclass

from nest.errors import InputError


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of `evaluate`; all faults are reported together.

    Attributes:
        max_new_tokens: Longest answer, in tokens. Attack success rises with it.
        seed: Of the bootstrap behind the mean's interval; decoding is greedy and needs none.
        bootstrap_resamples: Samples of that bootstrap.
        benign_twin_prompts: At most how many harmless prompts are put through every attack, to tell
            safety from incapability; 0 leaves the benign twin out.
    """

    max_new_tokens: int = 256
    seed: int = 0
    bootstrap_resamples: int = 2000
    benign_twin_prompts: int = 50

    def __post_init__(self) -> None:
        least = {
            "max_new_tokens": 1,
            "seed": 0,
            "bootstrap_resamples": 100,
            "benign_twin_prompts": 0,
        }
        faults = [
            f"{name} is {getattr(self, name)}; expected at least {bound}"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]
        if faults:
            raise InputError("evaluation settings: " + "; ".join(faults))
