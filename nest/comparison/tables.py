"""The tables of a comparison, in Markdown: behaviour alone, so that they are the same at every run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nest.evaluation.metrics import Interval

if TYPE_CHECKING:
    from rich.table import Table

    from nest.comparison.result import Comparison, Summary

HEADINGS = (
    "arm",
    "attack success",
    "95 %",
    "seeds",
    "bare",
    "worst attack",
    "over-refusal",
    "exact match",
    "KL",
    "parameters",
    "p (Holm)",
)


def tables(comparison: Comparison) -> str:
    """All tables, one after the other, each under a heading."""
    parts = [f"# {comparison.plan.title or 'Comparison'}", measured_on(comparison)]
    for name, worlds in comparison.pools.items():
        parts += [
            f"## {name}",
            f"Mean over {', '.join(worlds)}.",
            summary_table(comparison, worlds),
        ]
    for world in comparison.plan.worlds:
        parts += [f"## {world}", world_sentence(comparison, world)]
        parts.append(summary_table(comparison, (world,)))
    for heading, table in (
        ("Other judges", judges_table(comparison)),
        ("Settings tried on development", choices_table(comparison)),
        ("Weights on benign answers", front_table(comparison)),
        ("Steps until attack success stays down", anytime_table(comparison)),
        ("What undoes it", robustness_table(comparison)),
        ("Runs that failed", failed_table(comparison)),
        ("Runs in which no step lowered the validation loss", unimproved_table(comparison)),
    ):
        parts += [f"## {heading}", table] if table else []
    return "\n\n".join(parts) + "\n"


def measured_on(comparison: Comparison) -> str:
    """What the figures are of, in words."""
    split = "test splits" if comparison.final else "development splits"
    seeds = len(comparison.plan.seeds)
    return (
        f"Measured on {split}; mean over {seeds} seed{'s' if seeds > 1 else ''}. Attack success is that "
        "under the held-out attacks (of bare prompts, in a world without attacks); its interval is a "
        "bootstrap over behaviours, `seeds` the lowest and highest seed. p is that of the difference in "
        f"attack success from `{comparison.plan.compared_with}` (paired permutation, corrected by Holm). "
        "A run that failed counts as no treatment. Rates are means over what prompts are about, each of "
        "which counts once; over single prompts they are in `results.json`, by run."
    )


def world_sentence(comparison: Comparison, world: str) -> str:
    """Of what model the world is, and what of its held-out prompts is close to what was learned from."""
    base, facts = comparison.base[world], comparison.worlds[world]
    role = (
        "settings may be chosen on its development split"
        if facts.role == "choosing"
        else ("no setting was chosen on it")
    )
    near = [
        f"{overlap['n']} of {overlap['of']} {what}"
        for what, overlap in facts.overlaps.items()
        if overlap["n"]
    ]
    said = f" Near-duplicates: {'; '.join(near)}." if near else ""
    return f"{base['architecture']}, {base['parameters']:,} parameters; {role}.{said}"


def summary_rows(comparison: Comparison, worlds: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Cells of the main table for these worlds together, `HEADINGS` above them."""
    return [_summary_row(comparison, one) for one in comparison.summaries_of(worlds)]


def summary_table(comparison: Comparison, worlds: tuple[str, ...]) -> str:
    """The main table for these worlds together."""
    return _markdown(HEADINGS, summary_rows(comparison, worlds))


def rich_table(comparison: Comparison) -> Table:
    """What of the main table fits into a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    split = "test splits" if comparison.final else "development splits"
    pool = next(iter(comparison.pools))
    table = Table(title=f"{pool.lower()}, {split}, percent", title_justify="left", box=SIMPLE_HEAD)
    table.pad_edge = False
    table.add_column("arm", overflow="fold")
    for heading in ("attack", "95 %", "refuses", "exact", "KL", "numbers", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in comparison.summaries:
        row = _summary_row(comparison, one)
        refuses = _percent(one.figures["over_refusal"])
        star = " *" if marked("", one) else ""
        table.add_row(f"{one.arm or 'untreated'}{star}", row[1], row[2], refuses, *row[7:])
    outcomes = [run.outcome for run in comparison.runs]
    failed = sum(one.failed is not None for one in outcomes)
    unimproved = sum(one.is_unimproved for one in outcomes)
    if failed or unimproved:
        stars = [f"* {marked(one.arm, one)}" for one in comparison.summaries if marked("", one)]
        table.caption_justify = "left"
        table.caption = "\n".join(
            (
                *stars,
                f"Of all {len(outcomes)} runs {failed} failed, and in {unimproved} no step improved: they "
                "count as the untreated model, and tables.md names them.",
            )
        )
    return table


def judges_table(comparison: Comparison) -> str:
    """Attack success in the words of the judges besides the first."""
    found = comparison.by_other_judges()
    names = list(dict.fromkeys(name for said in found.values() for name in said))
    rows = [
        (label(comparison, arm), *(_percent(said[name]) if name in said else "" for name in names))
        for arm, said in found.items()
    ]
    return _markdown(("arm", *names), rows) if names else ""


def choices_table(comparison: Comparison) -> str:
    """What each arm tried on development, and what it kept."""
    rows = []
    for arm, choice in comparison.choices.items():
        for tried in choice.tried:
            works = tried.score is not None
            kept = "kept" if works and tried.value == choice.value else ""
            score = "failed" if tried.score is None else f"{tried.score:.3f}"
            rows.append((label(comparison, arm), choice.knob, f"{tried.value:g}", score, kept))
    return _markdown(("arm", "setting", "value", "score", ""), rows) if rows else ""


def front_table(comparison: Comparison) -> str:
    """Each arm at each weight; a star where no other point of any arm is better in both."""
    rows = []
    for arm, points in comparison.fronts().items():
        for point in points:
            stars = {
                against: " *" if point[f"undominated_{against}"] else ""
                for against in ("over_refusal", "kl")
            }
            rows.append(
                (
                    label(comparison, arm),
                    f"{point['weight']:g}",
                    _percent(point["attack"]),
                    f"{_percent(point['over_refusal'])}{stars['over_refusal']}",
                    f"{point['kl']:.4f}{stars['kl']}",
                )
            )
    headings = ("arm", "weight", "attack success", "over-refusal", "KL")
    return _markdown(headings, rows) if rows else ""


def anytime_table(comparison: Comparison) -> str:
    """Optimizer steps until attack success first stays at or under the level, by world."""
    assert comparison.plan.anytime is not None or not comparison.anytime()
    rows = []
    for arm, found in _by_arm(comparison.anytime()):
        steps = [
            "-" if row["seconds_to_level"] is None else str(row["steps_to_level"]) for row in found
        ]
        rows.append((label(comparison, arm), ", ".join(steps)))
    if not rows or comparison.plan.anytime is None:
        return ""
    worlds = ", ".join(comparison.plan.worlds_of("anytime"))
    level = _percent(comparison.plan.anytime.level)
    return _markdown(("arm", f"steps to {level} ({worlds})"), rows)


def robustness_table(comparison: Comparison) -> str:
    """Attack success after subtraction and after fine-tuning, and the steps that undo half."""
    rows = []
    for arm, found in _by_arm(comparison.robustness()):
        told = [row["found"] for row in found if row["found"] is not None]
        if not told:
            reason = "failed" if any(row["failed"] for row in found) else "changes no weights"
            rows.append((label(comparison, arm), reason, *[""] * 6))
            continue
        cells = [
            _rates([one[key]["attack_success"] for one in told])
            for key in ("treated", "subtracted")
        ]
        for kind in ("benign", "harmful"):
            kinds = [one[kind] for one in told if kind in one]
            if len(kinds) < len(told):
                cells += [""] * 3
                continue
            undone = [one["undone_after"] for one in kinds]
            nothing = [
                one["base"]["attack_success"] <= one["treated"]["attack_success"] for one in told
            ]
            cells.append(
                ", ".join(
                    "no effect" if none else "never" if n is None else str(n)
                    for n, none in zip(undone, nothing, strict=True)
                )
            )
            cells.append(_rates([one["curve"][-1]["attack_success"] for one in kinds]))
            cells.append(_rates([one["applied_again"]["attack_success"] for one in kinds]))
        rows.append((label(comparison, arm), *cells))
    headings = (
        *("arm", "treated", "subtracted", "benign steps", "after", "again"),
        *("harmful steps", "after", "again"),
    )
    return _markdown(headings, [(*row, *[""] * (9 - len(row))) for row in rows]) if rows else ""


def failed_table(comparison: Comparison) -> str:
    """Runs without figures, and why."""
    rows = [
        (run.task.name, run.outcome.failed)
        for run in comparison.runs
        if run.outcome.failed is not None
    ]
    return _markdown(("run", "why"), rows) if rows else ""


def unimproved_table(comparison: Comparison) -> str:
    """Runs whose training made nothing better: their figures are those of the model as it is."""
    rows = [(run.task.name,) for run in comparison.runs if run.outcome.is_unimproved]
    return _markdown(("run",), rows) if rows else ""


def label(comparison: Comparison, arm: str) -> str:
    """An arm's row in the tables."""
    return comparison.plan.arm_of(arm).label if arm else "untreated"


def marked(name: str, one: Summary) -> str:
    """An arm's name with how many of its runs are no treatment, and why."""
    said = (
        f"{one.n_failed} failed" if one.n_failed else "",
        f"no step improved in {one.n_unimproved}" if one.n_unimproved else "",
    )
    why = ", ".join(filter(None, said))
    return f"{name} ({why})" if why else name


def _summary_row(comparison: Comparison, one: Summary) -> tuple[str, ...]:
    figures = one.figures
    return (
        marked(label(comparison, one.arm), one),
        _percent(figures["attack"]),
        _interval(one.intervals["attack"]),
        _interval(one.seeds),
        _percent(figures["bare"]),
        _percent(figures["worst"]),
        f"{_percent(figures['over_refusal'])} ({_interval(one.intervals['over_refusal'])})",
        _percent(figures["exact_match"]),
        f"{figures['kl']:.4f}" if one.arm else "-",
        f"{round(figures['parameters']):,}" if one.arm else "-",
        "-" if one.p is None else f"{one.p:.2g}",
    )


def _by_arm(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    for arm in dict.fromkeys(row["arm"] for row in rows):
        yield arm, [row for row in rows if row["arm"] == arm]


def _rates(values: Sequence[float]) -> str:
    return _percent(float(np.mean(values))) if values else ""


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def _interval(bounds: Interval) -> str:
    return f"{100 * bounds[0]:.1f} - {100 * bounds[1]:.1f}"


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )
