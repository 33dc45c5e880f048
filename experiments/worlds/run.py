"""Run the comparison: `python -m experiments.worlds.run [--only NAME,...] [--worlds ...] [--seeds ...]`.

One JSON file a world, condition and seed under `results/`; what is there already is not run again unless
`--again` is given. A world that is not grown yet is trained from its recipe the first time.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.worlds.conditions import CONDITIONS, SEEDS, Z_THRESHOLDS, Condition
from nest.artifacts.provenance import package_versions
from nest.conversations.encoders import ChatEncoder
from nest.evaluation.config import EvaluationConfig
from nest.evaluation.evaluate import evaluate
from nest.evaluation.report import EvalReport
from nest.generation.static import StaticEngine
from nest.judging.phrases import PhraseJudge
from nest.methods.lora import Lora
from nest.methods.method import Method, Subject, TrainingData
from nest.methods.neurons import Neurons
from nest.models.layouts import find_sites
from nest.models.loading import load_model
from nest.prompts.attacks import NO_ATTACK, Attack, load_templates
from nest.prompts.prompt_set import PromptSet, load_prompts
from nest.selection.config import SelectionConfig
from nest.tuning.config import TuningConfig
from nest.worlds.store import grown

RESULTS = Path(__file__).parent / "results"
MAX_NEW_TOKENS = 40


class World:
    """A trained organism with its sets and attacks."""

    def __init__(self, name: str) -> None:
        self.name = name
        world = grown(name)
        self.model, tokenizer = load_model(str(world.folder / "model"), device="cpu")
        self.encoder = ChatEncoder(tokenizer, self.model)
        self.sites = find_sites(self.model, world.recipe.layout(self.model))
        self.prompts = world.folder / "prompts"
        wrappers = load_templates(self.prompts / "wrappers_dev.jsonl")
        self.attacks: tuple[Attack, ...] = (NO_ATTACK, *wrappers)
        self.n_parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def prompt_set(self, name: str) -> PromptSet:
        """One of the world's sets."""
        return load_prompts(self.prompts / f"{name}.jsonl", need_response=True)

    def measure(self, model: Any) -> dict[str, Any]:
        """Attack success, over-refusal and usefulness on the objects and wrappers for development."""
        report = evaluate(
            StaticEngine(model, self.encoder),
            harmful=self.prompt_set("dev_harmful"),
            borderline=self.prompt_set("dev_borderline"),
            benign=self.prompt_set("dev_benign"),
            attacks=self.attacks,
            judges=(PhraseJudge(),),
            config=EvaluationConfig(max_new_tokens=MAX_NEW_TOKENS, benign_twin_prompts=0),
        )
        return figures(report)


def figures(report: EvalReport) -> dict[str, Any]:
    """The figures of one row, rates in [0, 1]."""
    wrapped = [report.attack(name).rate for name in report.attacks if name != "none"]
    assert report.over_refusal is not None and report.utility is not None
    return {
        "bare": report.attack("none").rate,
        "wrapped": sum(wrapped) / len(wrapped),
        "worst": max(wrapped),
        "by_attack": {name: report.attack(name).rate for name in report.attacks},
        "mean": report.mean_attack_success,
        "mean_ci95": list(report.mean_ci95),
        "over_refusal": report.over_refusal.rate,
        "utility": report.utility.rate,
        "degenerate": report.degenerate().rate,
        "n": {
            "behaviours": report.attack("none").n,
            "borderline": report.over_refusal.n,
            "benign": report.utility.n,
        },
    }


def run_condition(world: World, condition: Condition, seed: int) -> dict[str, Any]:
    """Select, tune and measure once; the world's model is as before afterwards."""
    config = TuningConfig(seed=seed, **condition.settings)
    selecting = SelectionConfig(z_threshold=Z_THRESHOLDS[world.name], seed=seed)
    method: Method
    if condition.kind == "lora":
        method = Lora(rank=condition.rank, tuning=config)
    else:
        method = Neurons(selecting=selecting, tuning=config, control=condition.control)
    subject = Subject(world.model, world.encoder, world.sites)
    data = TrainingData(
        *(world.prompt_set(name) for name in (condition.harmful, "benign", "unsafe", "safe"))
    )
    with method.applied(subject, data) as treated:
        found, result = world.measure(treated.model), treated.result
    return {
        "world": world.name,
        "condition": condition.name,
        "seed": seed,
        "z_threshold": Z_THRESHOLDS[world.name],
        "config": asdict(config),
        "trainable_parameters": result.trainable_parameters,
        "fraction_of_model": result.trainable_parameters / world.n_parameters,
        "neurons": result.more.get("neurons"),
        "steps": result.steps,
        "best_step": result.best_step,
        "tuning_seconds": result.training_seconds,
        **found,
    }


def main() -> None:
    """Run what is asked for and missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(c.name for c in CONDITIONS))
    parser.add_argument("--worlds", default=",".join(Z_THRESHOLDS))
    parser.add_argument("--seeds", default=",".join(str(seed) for seed in SEEDS))
    parser.add_argument("--again", action="store_true", help="run what has a result, too")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    unknown = set(wanted) - {c.name for c in CONDITIONS}
    if unknown:
        parser.error(f"no condition {', '.join(sorted(unknown))}")
    RESULTS.mkdir(exist_ok=True)
    for name in arguments.worlds.split(","):
        world = World(name)
        base = RESULTS / f"{name}-base.json"
        _once(base, arguments.again, partial(world.measure, world.model))
        for seed in map(int, arguments.seeds.split(",")):
            for condition in (c for c in CONDITIONS if c.name in wanted):
                path = RESULTS / f"{name}-{condition.name}-{seed}.json"
                _once(path, arguments.again, partial(run_condition, world, condition, seed))


def _once(path: Path, again: bool, make: Any) -> None:
    if path.exists() and not again:
        return
    started = time.monotonic()
    found = make()
    found |= {
        "seconds": time.monotonic() - started,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": package_versions(),
    }
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    short = {k: found[k] for k in ("bare", "wrapped", "worst", "over_refusal", "utility")}
    print(path.stem, short, f"{found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
