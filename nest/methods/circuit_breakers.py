"""Circuit breakers: what the model represents at harmful requests is turned away from what it was."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from nest.activations.taps import ResidualTap, blocks_in, residual_taps
from nest.methods.adapters import adapted, peft_module
from nest.methods.method import Subject, TrainingData, Treated, Watch
from nest.methods.places import is_transposed, linear_modules
from nest.methods.training import Course, Rate, TuningWithoutRate, device_of, result_of, train
from nest.methods.watching import begun
from nest.models.calls import run_model
from nest.models.partial import run_until
from nest.models.wrappers import submodule
from nest.progress import ProgressCallback
from nest.settings import AtLeastOne, NotNegative, Positive, settings
from nest.tuning.config import TuningConfig
from nest.tuning.dialogues import (
    Example,
    MicroBatch,
    course_of,
    encode_dialogues,
    to_micro_batches,
)
from nest.tuning.objective import Keeps, Objective
from nest.tuning.trainable import Trainable

Tokens = Literal["all", "answers"]
Depth = Annotated[float, Field(gt=0, le=1)]
N_MEASURED = 16
"""Retained dialogues that the norm of hidden states is taken from."""


@settings("the method circuit_breakers")
class CircuitBreakers:
    """Train a LoRA whose hidden states are orthogonal to the model's own at harmful dialogues.

    Harmful prompts with complying answers (`TrainingData.complying`) are rerouted; benign dialogues and
    refusals (`TrainingData.harmful`) are retained. Where there are no complying answers, the harmful
    prompts alone are rerouted and refusals are not retained; what it was is in `MethodResult.more`. The
    answers that it breaks are seldom refusals: a judge by phrases alone takes them for compliance.

    Differences from the paper: the shared loop's learning-rate schedule instead of a constant rate, no
    dropout, and these, chosen on the organism's development split:

    - The LoRA begins with noise. With B = 0 the hidden states are the model's own, and there both losses
      are flat: in fp32 the first gradient had a norm of 3e-8.
    - The retaining distance is measured in the median norm of the model's own hidden states, which the
      weight of the paper's leaves to the model: at the organism's norm of 120, that weight held the
      hidden states within 0.1 % of where they were at every learning rate up to 1e-2.
    - Answers alone are rerouted or, of refusals, retained: their prompts are the same, and would be both.
    - Deeper targets, since the blocks of a small model see little of a dialogue at the paper's.

    What it costs depends on the seed. Of the attacks by held-out wrappers 95 % got the complying answer
    before; with these settings 26 % and 7 % did for two seeds, with 93 % and 38 % exact match.

    The last step is kept, since the loss does not tell how safe the model is.

    Attributes:
        rank: Of the LoRA, on every linear layer of the blocks up to the last target.
        alpha: Its output is multiplied with alpha / rank.
        start: What the LoRA adds to each weight before training, as a share of the weight's norm; 0 is
            the paper's.
        depths: Where hidden states are turned: after these shares of the blocks (the 10th and 20th of 32
            in the paper).
        tokens: Which tokens of harmful dialogues are turned, and of refusals retained: the `answers`, or
            `all` (the paper's); all where there are no complying answers.
        strength: Of both terms (10 and 5 in the paper).
        retain_weight: Of the retaining term, against 1 of the other; its distance is in units of the
            median norm of hidden states.
        learning_rate: Peak of the schedule.
        tuning: How it is trained; its weights of losses play no part.
        name: For tables.

    Source: arXiv 2406.04313, sections 3.2 and 3.3.
    """

    rank: Annotated[int, AtLeastOne] = 16
    alpha: Annotated[float, Positive] = 16.0
    start: Annotated[float, NotNegative] = 0.01
    depths: Annotated[tuple[Depth, ...], Field(min_length=1)] = (0.5, 0.75)
    tokens: Tokens = "answers"
    strength: Annotated[float, Positive] = 10.0
    retain_weight: Annotated[float, NotNegative] = 4.0
    learning_rate: Rate = 3e-3
    tuning: TuningWithoutRate = field(default_factory=TuningConfig)
    name: str = "circuit_breakers"

    knob: ClassVar[str] = "learning_rate"
    tried: ClassVar[tuple[float, ...]] = (1e-3, 3e-3, 1e-2, 3e-2)

    @contextmanager
    def applied(
        self,
        subject: Subject,
        data: TrainingData,
        *,
        progress: ProgressCallback | None = None,
        watch: Watch | None = None,
    ) -> Iterator[Treated]:
        """See `Method.applied`.

        Raises:
            InputError: PEFT is not installed, or a module is no linear layer.
            LayoutError: the model's blocks are not in one list.
        """
        peft, config, model = peft_module(self.name), self.tuning, subject.model
        with begun(subject, watch) as watcher:
            blocks, _ = blocks_in(model, layout=subject.sites)
            targets = target_layers(len(blocks.modules), self.depths)
            below = tuple(f"{blocks.path}.{layer}." for layer in range(targets[-1] + 1))
            paths = [
                path for path in linear_modules(subject, "all", self.name) if path.startswith(below)
            ]
            course, refusals = self._course(subject, data)
            shape = peft.LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,
                target_modules=paths,
                lora_dropout=0.0,
                fan_in_fan_out=is_transposed(submodule(model, paths[0])),
            )
            taps = residual_taps(model, targets, layout=subject.sites)
            retained = [example for example in course.train if example.benign]
            norm = median_norm(model, taps, retained[:N_MEASURED], subject.encoder.pad_id)
            with adapted(model, shape, seed=config.seed) as adapter:
                adapter.disturb(self.start, torch.Generator().manual_seed(config.seed))
                objective = Rerouting(
                    subject,
                    adapter,
                    taps,
                    refusals=refusals,
                    n_steps=course.n_steps,
                    tokens="all" if data.complying is None else self.tokens,
                    strength=self.strength,
                    retain_weight=self.retain_weight / norm,
                )
                loop = train(
                    subject,
                    adapter,
                    objective,
                    course,
                    config,
                    self.learning_rate,
                    watcher,
                    progress,
                )
                more = {
                    "rank": self.rank,
                    "layers": list(targets),
                    "rerouted": "harmful prompts alone: there are no complying answers"
                    if data.complying is None
                    else "harmful prompts with complying answers",
                    "refusals": len(refusals),
                    "median_norm": norm,
                }
                result = result_of(loop, adapter.n_parameters, watcher, more)
                yield Treated(model, result, adapter.merged)

    def _course(self, subject: Subject, data: TrainingData) -> tuple[Course, frozenset[Example]]:
        """What is trained on, and which of the retained dialogues are refusals."""
        encoder, train_on = subject.encoder, self.tuning.train_on
        benign = encode_dialogues(encoder, data.benign, benign=True, train_on=train_on)
        refusals: list[Example] = []
        if data.complying is None:
            prompts = (tuple(encoder.prompt(one)) for one in data.harmful.conversations)
            # The loop's dialogues have at least one token that is said; here none is learned.
            harmful = [Example(ids, len(ids) - 1, benign=False) for ids in prompts]
        else:
            harmful = encode_dialogues(encoder, data.complying, benign=False, train_on=train_on)
            refusals = encode_dialogues(encoder, data.harmful, benign=True, train_on=train_on)
        course = Course(*course_of(harmful, [*benign, *refusals], self.tuning))
        return course, frozenset(refusals)


class Coefficients(NamedTuple):
    """Weights of both terms at a step, neither ever negative."""

    retain: float
    reroute: float


def coefficients(step: int, n_steps: int, strength: float) -> Coefficients:
    """strength * p and strength * (1 - p), p = step / (2 * n_steps).

    Args:
        step: Optimizer steps done; micro-batches counted instead would turn the second one negative.
        n_steps: Optimizer steps in all.
        strength: Of both.
    """
    done = min(step, n_steps) / (2 * n_steps)
    return Coefficients(strength * done, strength * (1.0 - done))


def retaining(
    reference: Float[Tensor, "... D"], states: Float[Tensor, "... D"]
) -> Float[Tensor, "..."]:
    """Distance of hidden states from those of the untreated model, for each token, in fp32."""
    distance: Tensor = torch.linalg.vector_norm(states.float() - reference.float(), dim=-1)
    return distance


def rerouting(
    reference: Float[Tensor, "... D"], states: Float[Tensor, "... D"]
) -> Float[Tensor, "..."]:
    """ReLU(cos(reference, states)) for each token, in fp32."""
    return torch.cosine_similarity(reference.float(), states.float(), dim=-1).relu()


def target_layers(n_blocks: int, depths: Sequence[float]) -> tuple[int, ...]:
    """The blocks that stand at these shares of the depth, each once; from 0."""
    return tuple(sorted({max(1, round(depth * n_blocks)) - 1 for depth in depths}))


def hidden_states(
    model: nn.Module, taps: Sequence[ResidualTap], micro_batch: MicroBatch
) -> Float[Tensor, "L B T D"]:
    """At the taps; what is above the last one is not run."""
    device = device_of(model)
    ids = micro_batch.batch.input_ids.to(device)
    mask = micro_batch.batch.attention_mask.to(device)
    read: list[Tensor] = []
    with ExitStack() as stack:
        for tap in taps:
            stack.enter_context(tap.attach(model, read.append))
        last: Any = taps[-1].module_in(model)
        run_until(last, lambda: run_model(model, ids, mask, use_cache=False))
    return torch.stack([states.to(device) for states in read])


@torch.no_grad()
def median_norm(
    model: nn.Module, taps: Sequence[ResidualTap], examples: Sequence[Example], pad_id: int
) -> float:
    """Of hidden states at the taps over the tokens of dialogues, which go through one by one.

    The median, since some models' first token is a hundred times as large as the others.
    """
    norms = [
        torch.linalg.vector_norm(hidden_states(model, taps, one).float(), dim=-1).flatten()
        for one in to_micro_batches(examples, 1, pad_id)
    ]
    return float(torch.cat(norms).median())


class Rerouting(Objective):
    """The loss of circuit breakers.

    Args:
        subject: With the adapter in its model.
        adapter: Taken out for the reference.
        taps: Where hidden states are read; the model is run up to the last of them.
        n_steps: Optimizer steps in all.
        tokens: Which tokens of harmful dialogues are turned, and of refusals retained.
        strength: Of both terms.
        retain_weight: Of the retaining term beside it.
        refusals: Those of the benign dialogues that refuse a harmful prompt.
    """

    def __init__(
        self,
        subject: Subject,
        adapter: Trainable,
        taps: Sequence[ResidualTap],
        *,
        n_steps: int,
        tokens: Tokens,
        strength: float,
        retain_weight: float,
        refusals: Collection[Example] = (),
    ) -> None:
        self._model, self._adapter, self._taps = subject.model, adapter, tuple(taps)
        self._refusals, self._n_steps, self._tokens = refusals, n_steps, tokens
        self._strength, self._retain_weight = strength, retain_weight

    @property
    def keeps(self) -> Keeps:
        """See `Objective`."""
        return "last"

    def losses(self, micro_batches: Sequence[MicroBatch], step: int) -> Iterator[Float[Tensor, ""]]:
        """See `Objective`; each term is a mean over its kind's tokens in all micro-batches."""
        weights = coefficients(step, self._n_steps, self._strength)
        masks = [self._masks(micro_batch) for micro_batch in micro_batches]
        n_retained = max(1, sum(int(retained.sum()) for retained, _ in masks))
        n_rerouted = max(1, sum(int(rerouted.sum()) for _, rerouted in masks))
        for micro_batch, (retained, rerouted) in zip(micro_batches, masks, strict=True):
            with torch.no_grad(), self._adapter.removed():
                reference = self._hidden_states(micro_batch)
            states = self._hidden_states(micro_batch)
            retain = retaining(reference[:, retained], states[:, retained])  # (L, N)
            reroute = rerouting(reference[:, rerouted], states[:, rerouted])
            n_layers = len(self._taps)
            yield (
                weights.retain * self._retain_weight * retain.sum() / (n_layers * n_retained)
                + weights.reroute * reroute.sum() / (n_layers * n_rerouted)
            )

    def _masks(self, micro_batch: MicroBatch) -> tuple[Bool[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """Tokens that are retained, and those that are turned."""
        batch, device = micro_batch.batch, device_of(self._model)
        benign = torch.tensor([e.benign for e in micro_batch.examples])[:, None]
        refused = torch.tensor([e in self._refusals for e in micro_batch.examples])[:, None]
        own = batch.attention_mask.bool()
        said = own if self._tokens == "all" else batch.completion_mask
        retained = torch.where(refused, said, own) & benign
        return retained.to(device), (said & ~benign).to(device)

    def _hidden_states(self, micro_batch: MicroBatch) -> Float[Tensor, "L B T D"]:
        return hidden_states(self._model, self._taps, micro_batch)
