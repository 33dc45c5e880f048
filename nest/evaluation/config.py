"""What an evaluation needs to know, besides the model and the prompts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nest.settings import AtLeastOne, NotNegative, settings

Engine = Literal["auto", "static", "paged"]
"""How answers are decoded."""


@settings("evaluation settings")
class EvaluationConfig:
    """Settings of `evaluate`.

    Attributes:
        max_new_tokens: Longest answer, in tokens. Attack success rises with it.
        seed: Of the bootstrap behind the mean's interval; decoding is greedy and needs none.
        bootstrap_resamples: Samples of that bootstrap.
        benign_twin_prompts: At most how many harmless prompts are put through every attack, to tell
            safety from incapability; 0 leaves the benign twin out.
        engine: How answers are decoded: `static` batches, the `paged` continuous batching of
            transformers, or `auto`, which takes the latter where it pays. The answers are the same.
    """

    max_new_tokens: Annotated[int, AtLeastOne] = 256
    seed: Annotated[int, NotNegative] = 0
    bootstrap_resamples: Annotated[int, Field(ge=100)] = 2000
    benign_twin_prompts: Annotated[int, NotNegative] = 50
    engine: Engine = "auto"
