"""Rankers that learn from dialogues: what a neuron writes, and not only what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nest.activations.capture import Activations
from nest.conversations.answers import target_logits
from nest.conversations.encoders import Encoder
from nest.errors import NoImprovementError, SelectionError, TuningStoppedError
from nest.models.modes import eval_mode
from nest.models.sites import NeuronSite
from nest.progress import ProgressCallback
from nest.prompts.prompt_set import PromptSet
from nest.scoring.gradients import SiteGradient, gathered
from nest.selection.choosing import Ranking, Scored
from nest.selection.config import SelectionConfig
from nest.selection.probe import z_scores
from nest.selection.selection import NeuronSelection
from nest.tuning.config import TuningConfig
from nest.tuning.dialogues import Example, MicroBatch, encode_dialogues, to_micro_batches
from nest.tuning.loss import tuning_loss
from nest.tuning.memory import in_memory
from nest.tuning.tune import TuningResult, tune_update

MICRO_BATCH_SIZE = 8


@dataclass(frozen=True, eq=False)
class FromDialogues:
    """What a ranker learns from, and on which model.

    Attributes:
        model: Left as it was.
        encoder: Turns dialogues into tokens.
        harmful: Prompts with the refusals to give.
        benign: Prompts with their good answers.
        config: Of the selection.
        tuning: Of the tuning that is to follow: batch size, weights, what of a dialogue is learned.
        progress: Called with stage, steps done, steps in all.
        warn: Told what deserves attention.
    """

    model: nn.Module
    encoder: Encoder
    harmful: PromptSet
    benign: PromptSet
    config: SelectionConfig
    tuning: TuningConfig
    progress: ProgressCallback | None = None
    warn: Callable[[str], None] = lambda text: None

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Ranker.identity`."""
        return {
            "harmful": self.harmful.sha256,
            "benign": self.benign.sha256,
            "tuning": asdict(self.tuning),
        }

    def examples(self) -> list[Example]:
        """All dialogues as tokens.

        Raises:
            InputError: see `encode_dialogues`.
        """
        sets = ((self.harmful, False), (self.benign, True))
        return [
            example
            for dialogues, benign in sets
            for example in encode_dialogues(
                self.encoder, dialogues, benign=benign, train_on=self.tuning.train_on
            )
        ]

    def gradients(self, sites: Sequence[NeuronSite], *, refusals: bool) -> dict[str, SiteGradient]:
        """Gradients of the loss that tuning begins with, a mean over its response tokens.

        Args:
            sites: Where.
            refusals: Of refusals alone; else of good answers, too.
        """
        examples = [one for one in self.examples() if not (refusals and one.benign)]
        n_targets = sum(one.n_targets for one in examples)

        def gather(size: int) -> dict[str, SiteGradient]:
            micro_batches = to_micro_batches(examples, size, self.encoder.pad_id)
            return gathered(self.model, sites, self._losses(micro_batches), seed=self.config.seed)

        with eval_mode(self.model):
            found = in_memory(
                gather,
                MICRO_BATCH_SIZE,
                "look at fewer --layers, or leave out the longest dialogues",
            )
        for (
            one
        ) in found.values():  # after the sums: half precision has no room for so small numbers
            one.rows /= n_targets
            one.outputs /= n_targets
        return found

    def _losses(self, micro_batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        device = next(self.model.parameters()).device
        for done, micro_batch in enumerate(micro_batches):
            logits, targets, rows = target_logits(self.model, micro_batch.batch, device)
            benign = torch.tensor([e.benign for e in micro_batch.examples], device=rows.device)
            yield tuning_loss(
                logits,
                targets,
                benign[rows],
                None,  # at the start the KL has no gradient
                benign_weight=self.tuning.benign_weight,
                kl_weight=0.0,
            )
            if self.progress:
                self.progress("gather gradients", done + 1, len(micro_batches))


@dataclass(frozen=True, eq=False)
class ByEffect(FromDialogues):
    """Difference of a neuron's activations, times what it does to refusals.

        score_i = -(mean_unsafe a_i - mean_safe a_i) sum over tokens of dL/dy_i,  L the refusals' loss

    To first order: how much likelier refusals become where the neuron is moved, at every token, from what
    it is on safe prompts to what it is on unsafe ones.
    """

    def rank(self, activations: Activations, unsafe: NDArray[np.bool_]) -> Ranking:
        """See `Ranker.rank`."""
        found = self.gradients(activations.sites, refusals=True)
        scored = []
        for site, pooled in zip(activations.sites, activations.pooled, strict=True):
            values = np.asarray(pooled, dtype=np.float64)
            apart = values[unsafe].mean(axis=0) - values[~unsafe].mean(axis=0)
            scored.append(_scored(site, -apart * _array(found[site.name].outputs), self.config))
        return Ranking(tuple(scored))


@dataclass(frozen=True, eq=False)
class ByGradient(FromDialogues):
    """Length of the gradient of a neuron's weights; groups are those of like direction.

    A cluster's shared row gains to first order what the sum of its neurons' gradients is long: neurons
    with long gradients of one direction are what a tied update gains most from.
    """

    def rank(self, activations: Activations, unsafe: NDArray[np.bool_]) -> Ranking:
        """See `Ranker.rank`."""
        found = self.gradients(activations.sites, refusals=False)
        rows = {name: _array(one.rows) for name, one in found.items()}
        lengths = {name: np.linalg.norm(values, axis=1) for name, values in rows.items()}
        directions = {
            name: values / np.maximum(lengths[name], 1e-30)[:, None]
            for name, values in rows.items()
        }
        scored = [_scored(site, lengths[site.name], self.config) for site in activations.sites]
        return Ranking(tuple(scored), directions)


@dataclass(frozen=True, eq=False)
class ByLearning(FromDialogues):
    """What training made of all neurons: one loading each, one vector a site, for some steps.

        score_i = |s_i| |U|

    That is a LoRA of rank 1 on every site. Groups are by the sign of s.
    """

    def rank(self, activations: Activations, unsafe: NDArray[np.bool_]) -> Ranking:
        """See `Ranker.rank`.

        Raises:
            SelectionError: the training did not lower the loss.
        """
        sites = activations.sites
        trained = self._trained(sites)
        patch = trained.patch
        assert patch.loadings is not None
        scored, signs = {}, {}
        for part in patch.selection.sites:
            lengths = patch.vectors[part.group].norm(dim=1)[part.clusters]
            signed = _array(patch.loadings[part.site.name] * lengths)
            scored[part.site.name] = _scored(part.site, np.abs(signed), self.config)
            signs[part.site.name] = np.sign(signed)[:, None]
        learned = {
            "steps": trained.steps,
            "best_step": trained.best_step,
            "validation_loss": min(record.validation_loss for record in trained.history),
        }
        return Ranking(tuple(scored[site.name] for site in sites), signs, {"learned": learned})

    def _trained(self, sites: Sequence[NeuronSite]) -> TuningResult:
        everything = {site.name: (range(site.length), [0] * site.length) for site in sites}
        config = replace(
            self.tuning,
            update="loaded",
            start="zero_loadings",
            learning_rate=None,
            epochs=self.config.learning_epochs,
            max_steps=None,
            layers=None,
            seed=self.config.seed,
        )
        try:
            return tune_update(
                self.model,
                self.encoder,
                NeuronSelection.of(self.model, everything, layout=sites),
                harmful=self.harmful,
                benign=self.benign,
                config=config,
                progress=self._as_learning,
                warn=self.warn,
            )
        except TuningStoppedError as fault:  # what was good before will do
            result: TuningResult = fault.result
            return result
        except NoImprovementError as fault:
            raise SelectionError(
                "no step of learning lowered the validation loss, so that no neuron can be told from "
                f"another; give more dialogues, --learning-epochs over {self.config.learning_epochs:g}, or "
                "another scorer"
            ) from fault

    def _as_learning(self, _stage: str, done: int, total: int) -> None:
        if self.progress:
            self.progress("learn neurons", done, total)


def _scored(site: NeuronSite, weights: NDArray[np.float64], config: SelectionConfig) -> Scored:
    """With their own size to be ranked by over all sites."""
    rank = np.abs(weights) if config.side == "both" else weights
    return Scored(site, weights, z_scores(weights), rank)


def _array(values: Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = values.detach().cpu().double().numpy()
    return array
