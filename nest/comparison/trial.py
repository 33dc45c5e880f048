"""One run: a method on a world with a seed, and what the treated model does."""

from __future__ import annotations

import resource
import sys
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nest.comparison.measuring import evaluated, measure
from nest.comparison.plan import Plan
from nest.comparison.robustness import undone
from nest.comparison.subjects import (
    Material,
    Measured,
    material_of,
    open_subject,
    spread,
    training_data,
)
from nest.comparison.task import Outcome, Task
from nest.errors import EngineError, NestError, NoMemoryError
from nest.evaluation.divergence import answer_log_probs, mean_kl
from nest.judging.makers import make_judges
from nest.methods.makers import with_benign_weight, with_knob
from nest.methods.method import Method, MethodResult, Subject
from nest.models.calls import n_embeddings

if TYPE_CHECKING:
    from nest.conversations.encoders import Encoder

KL_MEMORY_BYTES = 2**30
"""Log-probabilities of the treated model are kept up to this, until the base is asked."""
GROWTH = 1.5
"""Of the steps at which a model is looked at while it trains."""


def run_task(plan: Plan, task: Task, device: str = "cpu") -> Outcome:
    """What a run finds; a fault of the arm's is part of the outcome and not of the comparison.

    Args:
        plan: The comparison.
        task: The run.
        device: Where the model is put.

    Raises:
        InputError: a world or judge that cannot be used.
        EngineError: what judges failed.
    """
    material = material_of(plan, task.world, final=task.split == "test")
    subject, encoder = open_subject(plan, task.world, device)
    if task.stage == "base":
        measured = material.split(task.split)
        figures = measure(plan, subject.model, encoder, measured, make_judges(plan.judge))
        figures["parameters"] = sum(parameter.numel() for parameter in subject.model.parameters())
        figures["architecture"] = type(subject.model).__name__
        figures["groups"] = {name: list(one) for name, one in measured.groups.items()}
        return Outcome(figures, {"peak_memory_bytes": peak_memory_bytes(device)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            found = _treated(plan, task, material, subject, encoder, device)
        except (EngineError, NoMemoryError):
            raise  # a judge's server, or a machine that is too small or too full: no fault of the arm's
        except NestError as fault:
            found = Outcome(failed=f"{type(fault).__name__}: {fault}")
    said = dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning)
    return replace(found, warnings=tuple(said))


def _treated(
    plan: Plan,
    task: Task,
    material: Material,
    subject: Subject,
    encoder: Encoder,
    device: str,
) -> Outcome:
    arm = plan.arm_of(task.arm)
    method = plan.made(task.arm, task.seed)
    method = method if task.knob is None else with_knob(method, task.knob)
    method = method if task.weight == 1.0 else with_benign_weight(method, task.weight)
    data = training_data(material, arm.harmful)
    measured = material.split(task.split)
    watcher = _Watcher(plan, encoder, measured) if task.stage == "anytime" else None
    figures: dict[str, Any] = {}
    with method.applied(subject, data, watch=watcher) as treated:
        result = treated.result
        peak = peak_memory_bytes(device)
        judges = make_judges(plan.judge)  # after the peak was taken: a judge may be a large model
        if watcher is not None:
            watcher.look_at_end(treated.model, result)
        if task.stage == "robustness":
            changed = treated.changed()
        elif watcher is None:
            figures |= measure(plan, treated.model, encoder, measured, judges)
            kept = _kept_dialogues(subject.model, encoder, measured)
            log_probs = answer_log_probs(treated.model, encoder, kept)
    if watcher is not None:
        figures["curve"] = watcher.curve
    elif task.stage == "robustness":
        figures["robustness"] = (
            None  # no change of weights: there is nothing that could be fine-tuned away
            if changed is None
            else undone(plan, subject, encoder, material, measured, judges, changed)
        )
    else:
        figures["kl"] = mean_kl(answer_log_probs(subject.model, encoder, kept), log_probs)
        figures["kl_dialogues"] = len(kept)
    figures |= _facts(method, result)
    cost: dict[str, Any] = {
        "seconds": result.seconds,
        "training_seconds": result.training_seconds,
        "peak_memory_bytes": peak,
    }
    if watcher is not None:
        cost["seconds_of_curve"] = watcher.seconds
    return Outcome(figures, cost)


def peak_memory_bytes(device: str) -> int:
    """The most memory so far: allocated on a GPU, resident of this process elsewhere."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class _Watcher:
    """Attack success while a model trains, at steps that grow by half each time, and at the end.

    Attributes:
        curve: For each look the step, attack success (mean over attacks) and over-refusal.
        seconds: For each look the seconds since the method began.
    """

    def __init__(self, plan: Plan, encoder: Encoder, measured: Measured) -> None:
        assert plan.anytime is not None
        self._config, self._encoder = plan.evaluation_config(), encoder
        self._judges = make_judges(plan.judge)
        self._measured = measured.cut(plan.anytime.behaviours)
        self.curve: list[dict[str, float]] = []
        self.seconds: list[float] = []
        self._next = 0.0

    def __call__(self, model: nn.Module, step: int, seconds: float) -> None:
        if step >= self._next:
            self._next = max(step + 1, step * GROWTH)
            self.look(model, step, seconds)

    def look_at_end(self, model: nn.Module, result: MethodResult) -> None:
        """Add what is kept in the end, which may be the model of an earlier step."""
        last = max(result.steps, self.curve[-1]["step"] if self.curve else 0)
        self.look(model, int(last), result.seconds)

    def look(self, model: nn.Module, step: int, seconds: float) -> None:
        """Add a point to the curve."""
        report = evaluated(self._config, model, self._encoder, self._measured, self._judges)
        assert report.over_refusal is not None
        self.curve.append(
            {
                "step": step,
                "attack_success": report.mean_attack_success,
                "over_refusal": report.over_refusal.rate,
            }
        )
        self.seconds.append(seconds)


def _kept_dialogues(model: nn.Module, encoder: Encoder, measured: Measured) -> list[Any]:
    """As many benign dialogues, evenly spread, as there is memory to compare on."""
    chats = list(measured.benign.chats())
    vocabulary = n_embeddings(model) or 2**18
    tokens = sum(len(ids) - said for ids, said in (encoder.dialogue(*chat) for chat in chats))
    share = min(1.0, KL_MEMORY_BYTES / max(1, 4 * tokens * vocabulary))
    return [chats[index] for index in spread(len(chats), max(1, int(share * len(chats))))]


def _facts(method: Method, result: MethodResult) -> dict[str, Any]:
    return {
        "trainable_parameters": result.trainable_parameters,
        "steps": result.steps,
        "best_step": result.best_step,
        "history": [
            [record.step, record.train_loss, record.validation_loss] for record in result.history
        ],
        "more": dict(result.more),
    }
