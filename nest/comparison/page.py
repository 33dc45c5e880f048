"""The comparison as one HTML page: tables and figures inside, nothing loaded from anywhere."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nest.artifacts.provenance import package_versions
from nest.comparison import figures
from nest.comparison.tables import HEADINGS, label, measured_on, summary_rows, world_sentence
from nest.comparison.task import key_of
from nest.reporting.html import rendered

if TYPE_CHECKING:
    from nest.comparison.result import Comparison

DECIDING = ("peft", "scipy", "statsmodels")
"""Packages that decide results of comparisons, beside those of every stage."""


def page(comparison: Comparison, made: Mapping[str, str] | None = None) -> str:
    """The page's HTML.

    Args:
        comparison: What was found.
        made: By which command, and when.
    """
    plan = comparison.plan
    return rendered(
        "nest.comparison",
        "page.html.j2",
        title=plan.title or "Comparison of methods",
        lead=f"{_count(plan.arms, 'arm')} on {_count(plan.worlds, 'world')} with "
        f"{_count(plan.seeds, 'seed')}, with the same data and the same judges for each.",
        final=comparison.final,
        measured=measured_on(comparison),
        headings=HEADINGS,
        pools=[
            {
                "name": name,
                "worlds": ", ".join(worlds),
                "rows": summary_rows(comparison, worlds),
            }
            for name, worlds in comparison.pools.items()
        ],
        worlds=[
            {
                "name": world,
                "said": world_sentence(comparison, world),
                "rows": summary_rows(comparison, (world,)),
            }
            for world in plan.worlds
        ],
        costs=_costs(comparison),
        choices=[
            {
                "label": label(comparison, arm),
                "knob": choice.knob,
                "tried": [
                    {
                        "value": f"{one.value:g}",
                        "score": "failed" if one.score is None else f"{one.score:.3f}",
                        "kept": one.score is not None and one.value == choice.value,
                    }
                    for one in choice.tried
                ],
            }
            for arm, choice in comparison.choices.items()
            if choice.tried
        ],
        reached=_reached(comparison),
        equal=_equal(comparison),
        untrained=", ".join(label(comparison, arm) for arm in comparison.untrained),
        level=None if plan.anytime is None else f"{100 * plan.anytime.level:g} %",
        undone=_undone(comparison),
        judges=_judges(comparison),
        failed=[
            {"name": run.task.name, "why": run.outcome.failed}
            for run in comparison.runs
            if run.outcome.failed is not None
        ],
        unimproved=[run.task.name for run in comparison.runs if run.outcome.is_unimproved],
        warnings=_warnings(comparison),
        reproduce=_reproduce(comparison, made or {}),
        plots={
            "attack": figures.attack_svg(comparison),
            "worlds": figures.worlds_svg(comparison) if len(plan.worlds) > 1 else None,
            "fronts": figures.fronts_svg(comparison),
            "costs": figures.costs_svg(comparison),
            "anytime": figures.anytime_svg(comparison),
            "robustness": figures.robustness_svg(comparison),
        },
    )


def _count(values: Sequence[Any], name: str) -> str:
    return f"{len(values)} {name}{'' if len(values) == 1 else 's'}"


def _costs(comparison: Comparison) -> list[dict[str, str]]:
    return [
        {
            "label": label(comparison, one.arm),
            "parameters": f"{round(one.figures['parameters']):,}",
            "seconds": f"{one.costs['seconds']:.1f}",
            "training": f"{one.costs['training_seconds']:.1f}",
            "memory": f"{one.costs['peak_memory_bytes'] / 2**20:,.0f}",
        }
        for one in comparison.summaries[1:]
    ]


def _reached(comparison: Comparison) -> list[dict[str, str]]:
    """When each arm's attack success first stays at or under the level, by world."""
    rows = comparison.anytime()
    return [
        {
            "label": label(comparison, arm),
            "worlds": "; ".join(
                f"{row['world']}: not reached"
                if row["seconds_to_level"] is None
                else f"{row['world']}: {row['seconds_to_level']:.1f} s (step {row['steps_to_level']})"
                for row in rows
                if row["arm"] == arm
            ),
        }
        for arm in dict.fromkeys(row["arm"] for row in rows)
    ]


def _judges(comparison: Comparison) -> list[tuple[str, str]]:
    """What the judges besides the first say of each arm."""
    return [
        (
            label(comparison, arm),
            "; ".join(f"{name} {100 * rate:.1f} %" for name, rate in said.items()),
        )
        for arm, said in comparison.by_other_judges().items()
        if said
    ]


def _equal(comparison: Comparison) -> list[dict[str, str]]:
    """What each arm had reached in the seconds that the fastest one took, by world."""
    return [
        {
            "world": world,
            "seconds": f"{found['seconds']:.1f}",
            "arms": "; ".join(
                f"{label(comparison, arm)} {100 * one['attack']:.1f} % "
                f"(over-refusal {100 * one['over_refusal']:.1f} %)"
                for arm, one in sorted(found["arms"].items(), key=lambda item: item[1]["attack"])
            ),
        }
        for world, found in comparison.at_equal_seconds().items()
    ]


def _undone(comparison: Comparison) -> list[dict[str, str]]:
    """What each arm is undone by, and what it costs to apply it again."""
    rows = []
    found = comparison.robustness()
    for arm in dict.fromkeys(row["arm"] for row in found):
        own = [row for row in found if row["arm"] == arm]
        told = [row["found"] for row in own if row["found"] is not None]
        parameters = next((row["parameters"] for row in own if row["parameters"] is not None), None)
        row = {"label": label(comparison, arm), "said": ""}
        row["said"] = (
            _undone_sentence(told, parameters)
            if told
            else "changes no weights, or failed: nothing to undo"
        )
        rows.append(row)
    return rows


def _undone_sentence(told: list[Mapping[str, Any]], parameters: int | None) -> str:
    if all(one["base"]["attack_success"] <= one["treated"]["attack_success"] for one in told):
        return "had no effect: there is nothing to undo"

    def mean(values: list[float]) -> str:
        return f"{100 * float(np.mean(values)):.1f} %"

    said = [
        f"attack success {mean([one['treated']['attack_success'] for one in told])}, "
        f"{mean([one['subtracted']['attack_success'] for one in told])} once the change is subtracted"
    ]
    for kind in ("benign", "harmful"):
        kinds = [one[kind] for one in told if kind in one]
        if not kinds:
            continue
        steps = ", ".join(
            "never" if one["undone_after"] is None else str(one["undone_after"]) for one in kinds
        )
        again = mean([one["applied_again"]["attack_success"] for one in kinds])
        said.append(
            f"half of it back after {steps} steps of {kind} fine-tuning, {again} applied again"
        )
    cost = (
        ""
        if parameters is None
        else f"; applying it again adds {parameters:,} trained numbers' change"
    )
    return "; ".join(said) + cost


def _warnings(comparison: Comparison) -> list[str]:
    """What deserved attention, each sentence once with the number of runs that said it."""
    counts: dict[str, int] = {}
    for run in comparison.runs:
        for said in run.outcome.warnings:
            whole = f"{run.task.arm or 'untreated'}: {said}"
            counts[whole] = counts.get(whole, 0) + 1
    return [f"{said} ({count} run{'s' if count > 1 else ''})" for said, count in counts.items()]


def _reproduce(comparison: Comparison, made: Mapping[str, str]) -> list[tuple[str, str]]:
    plan = comparison.plan
    models = {
        f"model of {name}, sha256 of its files": facts.identity["model"]["files"]
        for name, facts in comparison.worlds.items()
    }
    facts = {
        **made,
        "measured on": "test splits" if comparison.final else "development splits",
        "plan, sha256 of its entry in results.json": key_of(plan.without_folders()),
        **models,
        "arms": ", ".join(plan.arms),
        "worlds": ", ".join(plan.worlds),
        "seeds": ", ".join(map(str, plan.seeds)),
        **({} if plan.sweep is None else {"seed of the sweep": str(plan.sweep.seed)}),
        "judge": plan.judge,
        "resamples": str(plan.resamples),
        "threads a worker": str(plan.threads),
        "machine": platform.machine(),
    }
    return [*facts.items(), *package_versions(*DECIDING).items()]
