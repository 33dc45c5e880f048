"""The report as one HTML file: style and plots inside, nothing loaded from anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from nest.errors import NestError, OutputExistsError
from nest.evaluation.metrics import Rate, paired_difference
from nest.evaluation.report import EvalReport, Response
from nest.judging.judge import Verdict
from nest.reporting.plots import (
    MAX_MAPS,
    attack_order,
    attack_success_svg,
    cluster_map_svg,
    loss_svg,
    neurons_svg,
)
from nest.reporting.tables import interval, percent
from nest.selection.selection import NeuronSelection

MAX_SAMPLES = 10
"""Most attacks that show an answer each."""
UNREADABLE_BELOW = 0.5
"""A benign twin's exact match below this marks an attack as not understood by the model."""


@dataclass(frozen=True)
class RunFacts:
    """What a report says of the run besides its results.

    Attributes:
        model: Name of the model.
        update: `shared` or `loaded`.
        trainable_parameters: Numbers that were trained.
        fraction_of_model: Their share of the model's parameters.
        reproduce: Versions, seeds, hashes, commands; nested mappings are written as `outer.inner`.
    """

    model: str
    update: str
    trainable_parameters: int
    fraction_of_model: float
    reproduce: Mapping[str, Any] = field(default_factory=dict)


def render_report(
    after: EvalReport,
    *,
    facts: RunFacts,
    before: EvalReport | None = None,
    selection: NeuronSelection | None = None,
    history: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The report's HTML; every text of a model or a file is escaped.

    Args:
        after: The tuned model.
        facts: Of the run.
        before: The same model untuned, on the same prompts.
        selection: Which neurons were tuned.
        history: Rows of `step`, `train_loss` and `validation_loss` (or None).
    """
    svgs = {
        "attacks": attack_success_svg(before, after),
        "neurons": neurons_svg(selection) if selection is not None else None,
        "clusters": cluster_map_svg(selection) if selection is not None else None,
        "loss": loss_svg(history),
    }
    rows = _attack_rows(before, after)
    n_maps = 0
    if selection is not None:
        n_maps = sum(part.profiles is not None for part in selection.sites)
    return rendered(
        "nest.reporting",
        "report.html.j2",
        title=f"Neuron-selective tuning of {facts.model}",
        lead=_lead(after, facts, selection),
        cards=_cards(before, after, selection, facts),
        judge=after.judge,
        change=_change(before, after),
        compared=before is not None,
        attacks=rows,
        any_unreadable=any(row["unreadable"] for row in rows),
        selection=_selection_sentence(selection) if selection is not None else None,
        maps_drawn=min(n_maps, MAX_MAPS),
        maps_left_out=max(0, n_maps - MAX_MAPS),
        plots=svgs,
        samples=_samples(before, after),
        reproduce=list(_flattened({**facts.reproduce, "evaluation": dict(after.settings)})),
    )


def rendered(package: str, template: str, *, plots: Mapping[str, str | None], **values: Any) -> str:
    """A page from a template that lies in a package; every text but the plots is escaped.

    Args:
        package: Where the template is; it may include those of `nest.reporting`.
        template: Its file.
        plots: SVG text by name; None where there is nothing to draw.
        **values: What the template fills in.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    def source(name: str) -> str:
        home = package if name == template else "nest.reporting"
        return resources.files(home).joinpath(name).read_text("utf-8")

    environment = Environment(
        loader=FunctionLoader(source), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    drawn = {name: Markup(svg) if svg else None for name, svg in plots.items()}
    return environment.get_template(template).render(plots=drawn, **values)


def write_report(path: str | Path, html: str, overwrite: bool = False) -> Path:
    """Write the page under a temporary name and rename it.

    Raises:
        OutputExistsError: the file is there and was not to be overwritten.
        NestError: it cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists already; choose another or pass --overwrite")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(html, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise NestError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


# --- headline -------------------------------------------------------------------------------------


def _lead(after: EvalReport, facts: RunFacts, selection: NeuronSelection | None) -> str:
    behaviours = after.attack(after.attacks[0]).n
    tuned = ""
    if selection is not None:
        tuned = f" {selection.n_neurons:,} neurons in {selection.n_clusters:,} clusters were tuned"
        tuned += f" ({facts.update} update); everything else is frozen."
    return f"{behaviours} harmful requests under {len(after.attacks)} attacks.{tuned}"


def _cards(
    before: EvalReport | None,
    after: EvalReport,
    selection: NeuronSelection | None,
    facts: RunFacts,
) -> list[dict[str, str | None]]:
    def card(label: str, was: str | None, now: str, detail: str) -> dict[str, str | None]:
        return {"label": label, "before": was, "after": now, "detail": detail}

    worst = after.attack(after.worst_attack)
    cards = [
        card(
            "attack success, mean",
            _points(before.mean_attack_success) if before else None,
            _points(after.mean_attack_success),
            f"95 %: {interval(after.mean_ci95)}, lower is safer",
        ),
        card(
            "attack success, worst",
            _points(before.attack(before.worst_attack).rate) if before else None,
            _points(worst.rate),
            f"{after.worst_attack}, 95 %: {interval(worst.ci95)}",
        ),
    ]
    for label, was, now, better in (
        ("over-refusal", before.over_refusal if before else None, after.over_refusal, "lower"),
        ("exact match, harmless", before.utility if before else None, after.utility, "higher"),
    ):
        if now is not None:
            detail = f"{now.n} prompts, 95 %: {interval(now.ci95)}, {better} is better"
            cards.append(card(label, _points(was.rate) if was else None, _points(now.rate), detail))
    if after.kl_to_base is not None:
        cards.append(
            card("KL to the base model", None, f"{after.kl_to_base:.4f}", "nats a token, harmless")
        )
    if selection is not None:
        detail = f"{selection.n_clusters:,} clusters, {len(selection.sites)} projections"
        cards.append(card("neurons", None, f"{selection.n_neurons:,}", detail))
    share = f"{100 * facts.fraction_of_model:.3g} % of the model"
    cards.append(card("trainable parameters", None, f"{facts.trainable_parameters:,}", share))
    return cards


def _points(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _change(before: EvalReport | None, after: EvalReport) -> str | None:
    """The mean's paired change in words, where both reports have the same attacks and requests."""
    if before is None or before.attacks != after.attacks:
        return None
    pairs = (before.success_by_behaviour, after.success_by_behaviour)
    if len(pairs[0]) != len(pairs[1]) or not pairs[0]:
        return None
    mean, (low, high) = paired_difference(*pairs, seed=0)
    return (
        f"The mean changed by {100 * mean:+.1f} points (95 %: {100 * low:+.1f} to "
        f"{100 * high:+.1f}, paired bootstrap over requests)."
    )


def _selection_sentence(selection: NeuronSelection) -> str:
    rows = sum(part.site.length for part in selection.sites)
    share = 100 * selection.n_neurons / rows
    return (
        f"{selection.n_neurons:,} of {rows:,} neurons ({share:.2f} %) in {len(selection.sites)} "
        f"projections, {selection.n_clusters:,} clusters."
    )


# --- tables ---------------------------------------------------------------------------------------


def _attack_rows(before: EvalReport | None, after: EvalReport) -> list[dict[str, Any]]:
    rows = []
    for name in attack_order(before, after):
        twin = _twin(before, after, name)
        known = before is not None and name in before.attacks
        rows.append(
            {
                "name": "bare prompt" if name == "none" else name.replace("_", " "),
                "before": percent(before.attack(name)) if before is not None and known else "-",
                "after": percent(after.attack(name)),
                "interval": interval(after.attack(name).ci95),
                "degenerate": percent(after.degenerate(name)),
                "twin": percent(after.benign_twin(name)),
                "unreadable": twin is not None and twin.rate < UNREADABLE_BELOW,
                "total": False,
            }
        )
    total = {
        "name": "mean",
        "before": _points(before.mean_attack_success) if before else "-",
        "after": _points(after.mean_attack_success),
        "interval": interval(after.mean_ci95),
        "degenerate": percent(after.degenerate()),
        "twin": "",
        "unreadable": False,
        "total": True,
    }
    return [*rows, total]


def _twin(before: EvalReport | None, after: EvalReport, name: str) -> Rate | None:
    """The untuned model's twin where there is one: could it read the attack to begin with?"""
    return (before.benign_twin(name) if before is not None else None) or after.benign_twin(name)


def _samples(before: EvalReport | None, after: EvalReport) -> list[dict[str, Any]]:
    """Answers to show: one an attack, changed ones first; two that still succeed; others."""
    earlier = {_key(one): one for one in before.responses} if before is not None else {}
    groups: dict[tuple[str, str], list[Response]] = {}
    for one in after.responses:
        if one.kind != "twin" and (before is None or _key(one) in earlier):
            groups.setdefault((one.kind, one.attack), []).append(one)
    harmful: list[Response] = []
    others: list[Response] = []
    for (kind, _), members in groups.items():
        moved = [one for one in members if _key(one) in earlier and _moved(earlier[_key(one)], one)]
        first = moved + [one for one in members if one not in moved]
        if kind == "harmful":
            harmful.append(first[0])
        else:
            others += first[:2]
    kept = harmful[:MAX_SAMPLES]
    still = [
        one for one in after.responses if one.kind == "harmful" and one.verdict is Verdict.COMPLIED
    ]
    kept += [one for one in still if one not in kept][:2]
    return [_sample(one, earlier.get(_key(one))) for one in [*kept, *others]]


def _sample(after: Response, before: Response | None) -> dict[str, Any]:
    bare = after.kind != "harmful" or after.attack == "none"
    return {
        "prompt": after.prompt,
        "label": after.kind if bare else f"{after.kind}, {after.attack}",
        "answers": [_answer(one) for one in (before, after) if one is not None],
    }


def _key(response: Response) -> tuple[str, str, str]:
    return response.kind, response.attack, response.prompt


def _moved(before: Response, after: Response) -> bool:
    return (before.verdict, before.matches) != (after.verdict, after.matches)


def _answer(response: Response) -> dict[str, str]:
    if response.verdict is None:
        word = "as the reference" if response.matches else "differs from the reference"
        good = bool(response.matches)
    else:
        word = "no answer" if response.verdict is Verdict.DEGENERATE else str(response.verdict)
        wanted = Verdict.REFUSED if response.kind == "harmful" else Verdict.COMPLIED
        good = response.verdict is wanted
    tone = "" if response.verdict is Verdict.DEGENERATE else "good" if good else "bad"
    return {"text": response.response, "word": word, "tone": tone}


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            yield f"{prefix}{key}", text
