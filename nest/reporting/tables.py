"""Results as rich tables, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from nest.evaluation.metrics import Interval, Rate
from nest.evaluation.report import EvalReport
from nest.selection.selection import NeuronSelection
from nest.tuning.loop import StepRecord


def eval_table(report: EvalReport, before: EvalReport | None = None) -> Table:
    """Attack success by attack, over-refusal and usefulness, with 95 % intervals.

    Args:
        report: The model as it is now.
        before: The same model untuned, for a column beside it.
    """
    table = Table(title=f"attack success, judge `{report.judge}`", title_justify="left")
    table.add_column("attack")
    if before is not None:
        table.add_column("before", justify="right")
    table.add_column("after" if before is not None else "success", justify="right")
    table.add_column("95 %", justify="right", style="dim")
    table.add_column("no answer", justify="right", style="dim")
    table.add_column("benign twin", justify="right", style="dim")
    columns = [before, report] if before is not None else [report]
    for name in report.attacks:
        rates = [one.attack(name) if name in one.attacks else None for one in columns]
        twin = report.benign_twin(name)
        table.add_row(
            "(bare prompt)" if name == "none" else name,
            *(percent(rate) for rate in rates),
            interval(report.attack(name).ci95),
            percent(report.degenerate(name)),
            percent(twin),
        )
    table.add_section()
    means = [f"{100 * one.mean_attack_success:.1f} %" for one in columns]
    without_bare = report.counted and "none" not in report.counted
    table.add_row(
        "mean of attacks" if without_bare else "mean",
        *means,
        interval(report.mean_ci95),
        percent(report.degenerate()),
        "",
        style="bold",
    )
    if report.n_samples > 1:
        names = report.counted or report.attacks
        at_k = [sum(one.success_at_k(name).rate for name in names) / len(names) for one in columns]
        figures = (f"{100 * value:.1f} %" for value in at_k)
        table.add_row(f"any of {report.n_samples} samples", *figures, "", "", "")
    table.add_section()
    for label, rates in (
        ("over-refusal", [one.over_refusal for one in columns]),
        ("exact match", [one.utility for one in columns]),
    ):
        if rates[-1] is not None:
            table.add_row(label, *map(percent, rates), interval(rates[-1].ci95), "", "")
    for agreement in report.agreements:
        kappa = "-" if agreement.kappa is None else f"kappa {agreement.kappa:.2f}"
        blanks = [""] * (len(columns) - 1)
        label = f"agrees with `{agreement.judges[1]}`"
        table.add_row(label, *blanks, f"{100 * agreement.share:.1f} %", kappa, "", "")
    if report.kl_to_base is not None:
        blanks = [""] * (len(columns) - 1)
        table.add_row("KL to base", *blanks, f"{report.kl_to_base:.4f} nats", "", "", "")
    return table


def selection_table(selection: NeuronSelection) -> Table:
    """Selected neurons and clusters by layer and projection, with the range of their z-scores.

    The last row's share is of all neurons that were looked at, those of sites without any included, where
    the selection says how many.
    """
    table = Table(title="selected neurons", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("projection")
    for heading in ("neurons", "of", "share", "clusters", "z"):
        table.add_column(heading, justify="right")
    for part in sorted(selection.sites, key=lambda part: (part.site.layer, part.site.projection)):
        n = int(part.neurons.numel())
        table.add_row(
            str(part.site.layer),
            part.site.projection,
            f"{n:,}",
            f"{part.site.length:,}",
            f"{100 * n / part.site.length:.2f} %",
            str(part.n_clusters),
            f"{float(part.scores.min()):.2f} to {float(part.scores.max()):.2f}",
        )
    n_neurons = sum(int(part.neurons.numel()) for part in selection.sites)
    n_rows = sum(part.site.length for part in selection.sites)
    looked_at = selection.provenance.get("neurons_looked_at")
    n_rows = looked_at if isinstance(looked_at, int) and looked_at >= n_rows else n_rows
    table.add_section()
    table.add_row(
        "",
        f"{len(selection.sites)} sites",
        f"{n_neurons:,}",
        f"{n_rows:,}",
        f"{100 * n_neurons / n_rows:.2f} %",
        str(selection.n_clusters),
        "",
        style="bold",
    )
    return table


def tuning_table(history: Sequence[StepRecord], best_step: int) -> Table:
    """The loss curve, the step that was kept marked."""
    table = Table(title="loss", title_justify="left")
    for heading in ("step", "training", "validation", ""):
        table.add_column(heading, justify="right")
    for record in history:
        training = "-" if record.train_loss is None else f"{record.train_loss:.4f}"
        kept = "kept" if record.step == best_step else ""
        table.add_row(str(record.step), training, f"{record.validation_loss:.4f}", kept)
    return table


def percent(rate: Rate | None) -> str:
    """`12.5 %`, or a dash where nothing was measured."""
    return "-" if rate is None else f"{100 * rate.rate:.1f} %"


def interval(bounds: Interval) -> str:
    """`10.1 - 15.4`, in percent."""
    return f"{100 * bounds[0]:.1f} - {100 * bounds[1]:.1f}"
