"""Figures of a comparison, each a function from it to SVG text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from nest.comparison.result import Comparison, Summary
from nest.comparison.tables import label
from nest.reporting.plots import svg_figure

KINDS: Mapping[str, str] = {
    "untreated": "#c8553d",
    "ours": "#2a6f97",
    "baseline": "#e09f3e",
    "control": "#8a817c",
}
COLOURS = (
    *("#2a6f97", "#e07a1f", "#3a7d44", "#b3261e", "#7b4fa3"),
    *("#7a5230", "#d0559c", "#5f6b76", "#9a8a00", "#17a2b0"),
)
MARKS = "osD^vP*X<>phd"
LINES = ("-", "--", ":", "-.")
"""Arms take the next colour and the next mark; those that share a colour differ in mark and line. The
numbers of colours and marks have no common divisor: 130 arms are told apart by these two alone."""
WIDTH = 7.6
DECADE = 10.0
"""A logarithmic axis that spans less would have no tick with a number."""


def attack_svg(comparison: Comparison) -> str:
    """Attack success of every arm over the first pool of worlds, with its interval, lowest first."""
    ordered = sorted(comparison.summaries, key=lambda one: one.figures["attack"])
    with svg_figure("attack", WIDTH, 0.9 + 0.3 * len(ordered)) as (figure, out):
        axes = figure.add_subplot()
        places = np.arange(len(ordered))
        values = np.array([100 * one.figures["attack"] for one in ordered])
        bounds = np.array([[100 * bound for bound in one.intervals["attack"]] for one in ordered])
        axes.barh(places, values, 0.66, color=[_colour(comparison, one.arm) for one in ordered])
        axes.errorbar(
            values,
            places,
            xerr=np.abs(np.stack([values - bounds[:, 0], bounds[:, 1] - values])),
            fmt="none",
            ecolor="#1f2933",
            elinewidth=0.9,
            capsize=2,
        )
        axes.set_yticks(places, [label(comparison, one.arm) for one in ordered])
        axes.invert_yaxis()
        axes.set_xlim(0, max(5.0, 1.05 * float(bounds.max())))
        axes.set_xlabel("attack success, %")
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    return out[0]


def worlds_svg(comparison: Comparison) -> str:
    """Attack success of every arm on every world, as a map."""
    arms, worlds = ("", *comparison.plan.arms), comparison.plan.worlds
    by_world = {
        world: {one.arm: one for one in comparison.summaries_of((world,))} for world in worlds
    }
    values = np.array(
        [[100 * by_world[world][arm].figures["attack"] for world in worlds] for arm in arms]
    )
    with svg_figure("worlds", WIDTH, 0.9 + 0.3 * len(arms)) as (figure, out):
        axes = figure.add_subplot()
        axes.imshow(values, cmap="YlOrRd", vmin=0, vmax=100, aspect="auto")
        for row, column in np.ndindex(values.shape):
            dark = values[row, column] > 60
            axes.text(
                column,
                row,
                f"{values[row, column]:.1f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "#1f2933",
            )
        axes.set_xticks(range(len(worlds)), worlds)
        axes.set_yticks(range(len(arms)), [label(comparison, arm) for arm in arms])
        axes.grid(False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return out[0]


def fronts_svg(comparison: Comparison) -> str | None:
    """Attack success against over-refusal and against KL, each arm along its weight on benign answers."""
    fronts = comparison.fronts()
    if not fronts:
        return None
    with svg_figure("fronts", WIDTH, _height(comparison)) as (figure, out):
        left, right = figure.subplots(1, 2)
        for arm, points in fronts.items():
            for axes, against, scale in ((left, "over_refusal", 100), (right, "kl", 1)):
                axes.plot(
                    [scale * point[against] for point in points],
                    [100 * point["attack"] for point in points],
                    ms=4,
                    lw=0.9,
                    **_line_of(comparison, arm),
                )
        left.set_xlabel("over-refusal, %")
        left.set_ylabel("attack success, %")
        right.set_xlabel("KL to the untreated model, nats a token")
        _scaled(right, "symlog", linthresh=1e-3)
        _legend(figure, left)
    return out[0]


def costs_svg(comparison: Comparison) -> str:
    """Attack success against trained parameters and against seconds."""
    with svg_figure("costs", WIDTH, _height(comparison)) as (figure, out):
        left, right = figure.subplots(1, 2, sharey=True)
        for one in comparison.summaries[1:]:
            mark = {"s": 34, **_mark_of(comparison, one.arm)}
            left.scatter([max(1.0, one.figures["parameters"])], [_attack(one)], **mark)
            right.scatter([one.costs["seconds"]], [_attack(one)], **mark)
        sizes = [max(1.0, one.figures["parameters"]) for one in comparison.summaries[1:]]
        if max(sizes) >= DECADE * min(sizes):
            _scaled(left, "log")
        left.set_xlabel("trained parameters")
        left.set_ylabel("attack success, %")
        right.set_xlabel("seconds, selection included")
        _legend(figure, left)
    return out[0]


def anytime_svg(comparison: Comparison) -> str | None:
    """Attack success on development while an arm trains, against seconds, a panel a world."""
    rows = [row for row in comparison.anytime() if row["curve"]]
    if not rows:
        return None
    worlds = list(dict.fromkeys(row["world"] for row in rows))
    with svg_figure("anytime", WIDTH, _height(comparison)) as (figure, out):
        panels = figure.subplots(1, len(worlds), sharey=True, squeeze=False)[0]
        for axes, world in zip(panels, worlds, strict=True):
            for arm in comparison.plan.arms:
                for row in rows:
                    if (row["world"], row["arm"]) == (world, arm):
                        axes.plot(
                            [point["seconds"] for point in row["curve"]],
                            [100 * point["attack_success"] for point in row["curve"]],
                            ms=3,
                            lw=0.9,
                            **_line_of(comparison, arm),
                        )
            axes.set_title(world)
            axes.set_xlabel("seconds, selection included")
        panels[0].set_ylabel("attack success on development, %")
        _legend(figure, panels[0])
    return out[0]


def robustness_svg(comparison: Comparison) -> str | None:
    """Attack success after steps of benign and of harmful fine-tuning, mean over worlds and seeds."""
    found = [row for row in comparison.robustness() if row["found"] is not None]
    if not found:
        return None
    with svg_figure("robustness", WIDTH, _height(comparison)) as (figure, out):
        panels = figure.subplots(1, 2, sharey=True)
        for axes, kind in zip(panels, ("benign", "harmful"), strict=True):
            for arm in comparison.plan.arms:
                told = [row["found"] for row in found if row["arm"] == arm and kind in row["found"]]
                if told:
                    _curve(axes, comparison, arm, told, kind)
            axes.set_title(f"{kind} fine-tuning")
            axes.set_xlabel("optimizer steps")
            _scaled(axes, "symlog", linthresh=1.0)
        panels[0].set_ylabel("attack success, %")
        _legend(figure, panels[0])
    return out[0]


def _curve(
    axes: Axes,
    comparison: Comparison,
    arm: str,
    told: Sequence[Mapping[str, Any]],
    kind: str,
) -> None:
    steps = [0, *(int(point["step"]) for point in told[0][kind]["curve"])]
    rates = np.mean(
        [
            [
                one["treated"]["attack_success"],
                *(point["attack_success"] for point in one[kind]["curve"]),
            ]
            for one in told
        ],
        axis=0,
    )
    axes.plot(steps, 100 * rates, ms=3.5, lw=0.9, **_line_of(comparison, arm))


def _scaled(axes: Axes, scale: str, **how: float) -> None:
    """A scale whose ticks are plain numbers: names are no mathematics here, and so no number is."""
    axes.set_xscale(scale, **how)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)


def _legend(figure: Any, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))  # an arm with several seeds has a line for each
    figure.legend(
        once.values(), once, loc="outside lower center", ncols=3, fontsize=8, handlelength=3.2
    )


def _attack(one: Summary) -> float:
    return 100 * one.figures["attack"]


def _colour(comparison: Comparison, arm: str) -> str:
    return KINDS[comparison.plan.arm_of(arm).kind if arm else "untreated"]


def _height(comparison: Comparison) -> float:
    """Inches, the legend's included: a row of it for three arms."""
    return 4.2 + 0.2 * math.ceil(len(comparison.plan.arms) / 3)


def _mark_of(comparison: Comparison, arm: str) -> dict[str, Any]:
    """An arm's mark and colour, the same in all figures."""
    number = comparison.plan.arms.index(arm)
    return {
        "marker": MARKS[number % len(MARKS)],
        "color": COLOURS[number % len(COLOURS)],
        "label": label(comparison, arm),
    }


def _line_of(comparison: Comparison, arm: str) -> dict[str, Any]:
    """The same with its line."""
    number = comparison.plan.arms.index(arm)
    return {
        **_mark_of(comparison, arm),
        "linestyle": LINES[number // len(COLOURS) % len(LINES)],
    }
