"""Figures of a report, each a function from results to SVG text."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nest.evaluation.report import EvalReport
from nest.selection.selection import NeuronSelection, SiteSelection

BEFORE, AFTER = "#c8553d", "#2a6f97"
PALETTE = ("#2a6f97", "#e09f3e", "#588157", "#9e2a2b", "#6d597a", "#468faf", "#b56576", "#8a817c")
MAX_MAPS = 16
"""Most sites in the cluster map; the ones with most neurons are drawn."""

_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "text.parse_math": False,  # names with dollars are names
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": "#3e4c59",
    "axes.titlesize": 10,
    "text.color": "#1f2933",
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
}


def attack_order(before: EvalReport | None, after: EvalReport) -> list[str]:
    """The bare prompt, then the other attacks by their success before (else after)."""
    ordering = before or after

    def success(name: str) -> float:
        return ordering.attack(name).rate if name in ordering.attacks else 0.0

    others = [name for name in after.attacks if name != "none"]
    return [
        *(name for name in after.attacks if name == "none"),
        *sorted(others, key=success, reverse=True),
    ]


def attack_success_svg(before: EvalReport | None, after: EvalReport) -> str:
    """Attack success before and after, with Wilson's 95 % intervals, in `attack_order`."""
    names = attack_order(before, after)
    with svg_figure("attacks", 7.6, 0.9 + 0.42 * len(names)) as (figure, out):
        axes = figure.add_subplot()
        centres = np.arange(len(names))
        thickness = 0.36 if before else 0.6
        if before:
            _rate_bars(axes, before, names, centres - 0.2, thickness, BEFORE, "before")
        _rate_bars(axes, after, names, centres + (0.2 if before else 0), thickness, AFTER, "after")
        labels = ["bare prompt" if name == "none" else name.replace("_", " ") for name in names]
        axes.set_yticks(centres, labels)
        axes.invert_yaxis()
        axes.set_xlim(0, 105)
        axes.set_xlabel("attack success, %")
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        if before:
            axes.legend(loc="lower right", ncols=2, bbox_to_anchor=(1, 1))
    return out[0]


def neurons_svg(selection: NeuronSelection) -> str:
    """Number of selected neurons by layer, one colour a projection."""

    counts: dict[str, dict[int, int]] = {}
    for part in selection.sites:
        layers = counts.setdefault(part.site.projection, {})
        layers[part.site.layer] = layers.get(part.site.layer, 0) + int(part.neurons.numel())
    last = max(part.site.layer for part in selection.sites)
    with svg_figure("neurons", 7.6, 2.6) as (figure, out):
        axes = figure.add_subplot()
        positions = np.arange(last + 1)
        width = 0.8 / len(counts)
        for index, (projection, layers) in enumerate(sorted(counts.items())):
            heights = [layers.get(layer, 0) for layer in range(last + 1)]
            offset = (index - (len(counts) - 1) / 2) * width
            axes.bar(
                positions + offset, heights, width * 0.92, color=_colour(index), label=projection
            )
        axes.set_xticks(positions[:: max(1, (last + 1) // 16)])
        axes.set_xlabel("layer")
        axes.set_ylabel("neurons selected")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(False, axis="x")
        axes.legend(ncols=len(counts), loc="lower right", bbox_to_anchor=(1, 1))
    return out[0]


def cluster_map_svg(selection: NeuronSelection) -> str | None:
    """Neurons of each site on the two main axes of their profiles, coloured by cluster.

    Profiles are standardised over prompts first, as they are for k-means; a larger dot has a higher
    score. None where the selection has no profiles.
    """
    drawn = sorted(
        (part for part in selection.sites if part.profiles is not None),
        key=lambda part: -part.neurons.numel(),
    )[:MAX_MAPS]
    if not drawn:
        return None
    drawn.sort(key=lambda part: (part.site.layer, part.site.projection))
    columns = min(4, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    with svg_figure("clusters", 7.6, 0.4 + 1.85 * rows) as (figure, out):
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(drawn) :]:
            axes.set_visible(False)
        for axes, part in zip(grid.flat, drawn, strict=False):
            _cluster_map(axes, part)
    return out[0]


def loss_svg(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Training and validation loss over the steps; None for an empty history.

    Args:
        history: Rows of `step`, `train_loss` and `validation_loss`, which may be None.
    """
    if not history:
        return None
    with svg_figure("loss", 7.6, 2.6) as (figure, out):
        axes = figure.add_subplot()
        steps = [row["step"] for row in history]
        axes.plot(steps, [row["train_loss"] for row in history], color="#9fb3c8", label="training")
        checked = [row for row in history if row.get("validation_loss") is not None]
        if checked:
            losses = [row["validation_loss"] for row in checked]
            axes.plot(
                [row["step"] for row in checked],
                losses,
                "o-",
                ms=3.5,
                color=AFTER,
                label="validation",
            )
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("loss, nats a token")
        axes.set_ylim(bottom=0)
        axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return out[0]


def principal_axes(profiles: np.ndarray) -> np.ndarray:
    """(N, P) profiles, standardised over prompts, on their two main axes: (N, 2).

    Each axis' sign is fixed so that its largest coordinate is positive.
    """
    spread = profiles.std(axis=1, keepdims=True)
    standard = (profiles - profiles.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    centred = standard - standard.mean(axis=0, keepdims=True)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(profiles), 2))
    kept = min(2, len(sizes))
    points[:, :kept] = left[:, :kept] * sizes[:kept]
    largest = np.abs(points).argmax(axis=0)
    signs = np.sign(points[largest, np.arange(2)])
    return np.asarray(points * np.where(signs == 0, 1.0, signs))


def _cluster_map(axes: Axes, part: SiteSelection) -> None:
    assert part.profiles is not None
    points = principal_axes(part.profiles.double().cpu().numpy())
    scores = part.scores.double().cpu().numpy()
    sizes = 14 + 30 * (scores - scores.min()) / max(float(np.ptp(scores)), 1e-9)
    colours = [_colour(int(cluster)) for cluster in part.clusters]
    axes.scatter(points[:, 0], points[:, 1], s=sizes, c=colours, alpha=0.85, linewidths=0)
    axes.set_title(f"layer {part.site.layer}  {part.site.projection}", fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.15)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color("#d9e2ec")


def _rate_bars(
    axes: Axes,
    report: EvalReport,
    names: Sequence[str],
    positions: np.ndarray,
    thickness: float,
    colour: str,
    label: str,
) -> None:
    kept = [
        (p, report.attack(n)) for p, n in zip(positions, names, strict=True) if n in report.attacks
    ]
    places = [position for position, _ in kept]
    values = np.array([100 * rate.rate for _, rate in kept])
    bounds = np.array([[100 * bound for bound in rate.ci95] for _, rate in kept]).reshape(-1, 2)
    errors = np.abs(np.stack([values - bounds[:, 0], bounds[:, 1] - values]))
    axes.barh(places, values, thickness, color=colour, label=label)
    axes.errorbar(
        values, places, xerr=errors, fmt="none", ecolor="#1f2933", elinewidth=0.9, capsize=2
    )


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


@contextmanager
def svg_figure(salt: str, width: float, height: float) -> Iterator[tuple[Figure, list[str]]]:
    """A figure of so many inches; once the block ends its SVG text is the list's only item.

    Without pyplot, so that no global figure state is left behind; the salt keeps the ids of several
    figures in one page apart and makes the text the same at every run.
    """

    out: list[str] = []
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, out
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    out.append(text[text.index("<svg") :].replace("<svg ", '<svg role="img" ', 1))
