"""The whole job on the embedded model: what `nest demo` does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nest import api
from nest.artifacts.storage import new_folder
from nest.evaluation.report import EvalReport
from nest.organism import model_folder
from nest.patches.patch import NeuronPatch
from nest.progress import ProgressCallback
from nest.reporting.html import RunFacts, render_report, write_report
from nest.selection.selection import NeuronSelection

ATTACKS = (
    "none,organism:wrappers_dev,forced_opener,refusal_suppression,developer_mode,persona,json_style,"
    "distractor,past_tense"
)
MAX_NEW_TOKENS = 40


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found and wrote."""

    report: Path
    selection: NeuronSelection
    patch: NeuronPatch
    before: EvalReport
    after: EvalReport
    fraction_of_model: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Headline figures and where everything is."""
        return {
            "report": str(self.report),
            "out": str(self.report.parent),
            "neurons": self.selection.n_neurons,
            "clusters": self.selection.n_clusters,
            "trainable_parameters": self.patch.trainable_parameters,
            "fraction_of_model": self.fraction_of_model,
            "before": _headline(self.before),
            "after": _headline(self.after),
            "seconds": self.seconds,
        }


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    warn: Callable[[str], None] | None = None,
) -> DemoResult:
    """Select, tune, evaluate before and after, fold, and write a report.

    Args:
        out: Gets `selection/`, `patch/`, `folded/` and `report.html`, all or nothing.
        seed: Of the selection's splits and the tuning.
        overwrite: Replace an older demo.
        progress: Called with stage, steps done, steps in all.
        warn: Told what deserves attention.

    Raises:
        OutputExistsError: `out` exists.
    """
    started = time.monotonic()
    with new_folder(out, kind="demo", overwrite=overwrite) as folder:
        model, tokenizer = api.load()
        selection = api.select(
            model,
            tokenizer,
            unsafe="organism:unsafe",
            safe="organism:safe",
            harmful="organism:harmful",
            benign="organism:benign",
            seed=seed,
            progress=progress,
            warn=warn,
        )
        selection.save(folder / "selection")
        before = _evaluate(model, tokenizer, None, progress)
        result = api.tune_result(
            model,
            tokenizer,
            selection,
            harmful="organism:harmful",
            benign="organism:benign",
            seed=seed,
            progress=progress,
        )
        with result.patch.applied(model):
            after = _evaluate(model, tokenizer, result.patch, progress)
        figures = _figures(before, after)
        patch = replace(result.patch, provenance={**result.patch.provenance, "figures": figures})
        evidence = {
            "before.json": json.dumps(before.to_json(), indent=1),
            "after.json": json.dumps(after.to_json(), indent=1),
        }
        patch.save(folder / "patch", evidence=evidence)
        api.fold(model_folder(), patch, folder / "folded")
        fraction = patch.trainable_parameters / patch.provenance["parameters"]
        page = render_report(
            after,
            before=before,
            selection=selection,
            history=[asdict(record) for record in result.history],
            facts=RunFacts(
                model="the bazaar organism",
                update=patch.update,
                trainable_parameters=patch.trainable_parameters,
                fraction_of_model=fraction,
                reproduce={
                    "command": f"nest demo --seed {seed}",
                    "versions": patch.provenance["versions"],
                    "tuning": patch.provenance["tuning"]["config"],
                    "selection": selection.provenance["config"],
                },
            ),
        )
        write_report(folder / "report.html", page)
        (folder / "manifest.json").write_text('{"kind": "demo"}\n', encoding="utf-8")
    return DemoResult(
        report=out / "report.html",
        selection=selection,
        patch=patch,
        before=before,
        after=after,
        fraction_of_model=fraction,
        seconds=time.monotonic() - started,
    )


def _evaluate(
    model: Any, tokenizer: Any, patch: NeuronPatch | None, progress: ProgressCallback | None
) -> EvalReport:
    return api.evaluate(
        model,
        tokenizer,
        harmful="organism:dev_harmful",
        borderline="organism:dev_borderline",
        benign="organism:dev_benign",
        attacks=ATTACKS,
        patch=patch,
        max_new_tokens=MAX_NEW_TOKENS,
        progress=progress,
    )


def _headline(report: EvalReport) -> dict[str, Any]:
    values = report.to_json()
    return {key: values[key] for key in ("attack_success_rate", "over_refusal_rate", "utility")}


def _figures(before: EvalReport, after: EvalReport) -> dict[str, str]:
    """What the patch's model card shows."""

    def rates(report: EvalReport) -> dict[str, float]:
        assert report.over_refusal is not None and report.utility is not None
        return {
            "attack success, mean over attacks": report.mean_attack_success,
            "attack success, bare prompts": report.attack("none").rate,
            "over-refusal on borderline prompts": report.over_refusal.rate,
            "exact match on harmless prompts": report.utility.rate,
        }

    old, new = rates(before), rates(after)
    return {name: f"{100 * old[name]:.1f} % before, {100 * new[name]:.1f} % after" for name in old}
