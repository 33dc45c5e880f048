"""What an evaluation needs to know, besides the model and the prompts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from nest.generation.sampling import Sampling, Seed, Stop, Temperature, TopP
from nest.settings import AtLeastOne, NotNegative, settings


@settings("evaluation settings")
class EvaluationConfig:
    """Settings of `evaluate`.

    Attributes:
        max_new_tokens: Longest answer, in tokens. Attack success rises with it.
        temperature: Of drawn answers; 0 takes the likeliest token each time.
        top_p: Only the likeliest tokens whose probabilities reach this sum.
        top_k: Only so many of the likeliest tokens; 0 takes all.
        samples: Answers to each prompt; attack success is then their mean, and beside it the share of
            prompts with any success.
        stop: A text that ends an answer; repeatable.
        seed: Of drawn answers, and of the bootstrap behind the mean's interval.
        bootstrap_resamples: Samples of that bootstrap.
        benign_twin_prompts: At most how many harmless prompts are put through every attack, to tell
            safety from incapability; 0 leaves the benign twin out.
    """

    max_new_tokens: Annotated[int, AtLeastOne] = 256
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: Annotated[int, NotNegative] = 0
    samples: Annotated[int, AtLeastOne] = 1
    stop: Stop = ()
    seed: Seed = 0
    bootstrap_resamples: Annotated[int, Field(ge=100)] = 2000
    benign_twin_prompts: Annotated[int, NotNegative] = 50

    @model_validator(mode="after")
    def _is_a_sampling(self) -> EvaluationConfig:
        self.sampling()
        return self

    def sampling(self) -> Sampling:
        """How answers are drawn.

        Raises:
            InputError: settings that do not go together, such as several samples at temperature 0.
        """
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            n=self.samples,
            seed=self.seed,
            stop=self.stop,
            max_new_tokens=self.max_new_tokens,
        )
