"""What an evaluation needs to know, besides the model and the prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from nest.errors import InputError

Engine = Literal["auto", "static", "paged"]
"""How answers are decoded."""

ENGINES: tuple[str, ...] = get_args(Engine)


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of `evaluate`; all faults are reported together.

    Attributes:
        max_new_tokens: Longest answer, in tokens. Attack success rises with it.
        seed: Of the bootstrap behind the mean's interval; decoding is greedy and needs none.
        bootstrap_resamples: Samples of that bootstrap.
        benign_twin_prompts: At most how many harmless prompts are put through every attack, to tell
            safety from incapability; 0 leaves the benign twin out.
        engine: How answers are decoded: `static` batches, the `paged` continuous batching of
            transformers, or `auto`, which takes the latter where it pays. The answers are the same.
    """

    max_new_tokens: int = 256
    seed: int = 0
    bootstrap_resamples: int = 2000
    benign_twin_prompts: int = 50
    engine: Engine = "auto"

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
        if self.engine not in ENGINES:
            faults.append(f"engine is {self.engine!r}; expected {', '.join(ENGINES)}")
        if faults:
            raise InputError("evaluation settings: " + "; ".join(faults))
