"""What a model does on a split: rates, and each prompt's outcome."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import nn

from nest.comparison.plan import Plan
from nest.comparison.subjects import Measured
from nest.evaluation.config import EvaluationConfig
from nest.evaluation.evaluate import evaluate
from nest.evaluation.report import EvalReport
from nest.generation.static import StaticEngine
from nest.judging.judge import REFUSALS, SUCCESSES, Judge
from nest.prompts.attacks import NO_ATTACK

if TYPE_CHECKING:
    from nest.conversations.encoders import Encoder


def measure(
    plan: Plan, model: nn.Module, encoder: Encoder, measured: Measured, judges: Sequence[Judge]
) -> dict[str, Any]:
    """Attack success, over-refusal and exact match, rates in [0, 1], with each prompt's outcome.

    Outcomes are texts of one digit a prompt, in the split's order: 1 where the attack succeeded, where a
    harmless request was refused, where an answer was the good one.
    """
    report = evaluated(plan.evaluation_config(), model, encoder, measured, judges)
    by_attack = {name: report.attack(name).rate for name in report.attacks}
    wrapped = {name: rate for name, rate in by_attack.items() if name != "none"}
    assert report.over_refusal is not None and report.utility is not None
    worst = max(wrapped or by_attack, key=lambda name: by_attack[name])
    return {
        "bare": by_attack["none"],
        "wrapped": sum(wrapped.values()) / len(wrapped) if wrapped else None,
        "worst": by_attack[worst],
        "worst_attack": worst,
        "over_refusal": report.over_refusal.rate,
        "exact_match": report.utility.rate,
        "degenerate": report.degenerate().rate,
        "by_attack": by_attack,
        "other_judges": {name: _said_by(report, name) for name in _others(report)},
        "outcomes": _outcomes(report),
    }


def evaluated(
    config: EvaluationConfig,
    model: nn.Module,
    encoder: Encoder,
    measured: Measured,
    judges: Sequence[Judge],
) -> EvalReport:
    """A model's answers to a split, judged."""
    return evaluate(
        StaticEngine(model, encoder),
        harmful=measured.harmful,
        borderline=measured.borderline,
        benign=measured.benign,
        attacks=measured.attacks,
        judges=judges,
        config=config,
        counted=tuple(one.name for one in measured.attacks if one.name != NO_ATTACK.name),
        encoder=encoder,
    )


def _others(report: EvalReport) -> list[str]:
    """The judges besides the first."""
    return list(dict.fromkeys(name for one in report.responses for name in one.others))


def _said_by(report: EvalReport, judge: str) -> dict[str, float | None]:
    """Attack success, bare and wrapped, in another judge's words."""
    by_attack = {
        name: fmean(
            one.others[judge] in SUCCESSES
            for one in report.responses
            if one.kind == "harmful" and one.attack == name and judge in one.others
        )
        for name in report.attacks
    }
    wrapped = [rate for name, rate in by_attack.items() if name != "none"]
    return {"bare": by_attack["none"], "wrapped": fmean(wrapped) if wrapped else None}


def _outcomes(report: EvalReport) -> dict[str, Any]:
    def digits(kind: str, attack: str | None = None) -> str:
        chosen = [
            one
            for one in report.responses
            if one.kind == kind and (attack is None or one.attack == attack)
        ]
        if kind == "benign":
            return "".join(str(int(bool(one.matches))) for one in chosen)
        counted = SUCCESSES if kind == "harmful" else REFUSALS
        return "".join(str(int(one.verdict in counted)) for one in chosen)

    return {
        "attacks": {name: digits("harmful", name) for name in report.attacks},
        "borderline": digits("borderline"),
        "benign": digits("benign"),
    }
