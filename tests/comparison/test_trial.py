"""Runs of the real thing, made small: the embedded model, a few prompts, two steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import merged

from nest.comparison.plan import Plan
from nest.comparison.robustness import undone_after
from nest.comparison.run import run_comparison
from nest.comparison.subjects import facts_of, material_of, spread
from nest.comparison.task import Outcome, Task
from nest.comparison.trial import run_task
from nest.errors import InputError
from nest.prompts.prompt_set import load_prompts


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A plan's values on the embedded model with eight prompts of a kind."""
    folder = tmp_path_factory.mktemp("sets")

    def some(name: str, count: int) -> str:
        full = load_prompts(f"organism:{name}")
        assert full.responses is not None
        kept = spread(len(full), count)
        rows = [
            {"prompt": full.conversations[i].asked, "response": full.responses[i]} for i in kept
        ]
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(file)

    table = {
        **{"model": "organism", "role": "choosing", "complying": some("unsafe", 24)},
        **{name: some(name, 24) for name in ("unsafe", "safe", "harmful", "benign")},
        "development": {
            "harmful": some("dev_harmful", 8),
            "borderline": some("dev_borderline", 8),
            "benign": some("dev_benign", 8),
            "attacks": "organism:wrappers_dev",
        },
    }
    return {
        "worlds": ["tiny"],
        "arms": ["neurons", "lora_r1", "steering"],
        "seeds": [0],
        "resamples": 100,
        "selecting": {"z_threshold": 1.5},
        "tuning": {"max_steps": 3, "batch_size": 8, "validate_every": 1, "validation": 0.4},
        "evaluation": {"max_new_tokens": 20},
        "world": {"tiny": table},
    }


def test_the_model_as_it_is(small: dict[str, Any]) -> None:
    found = run_task(Plan(**small), Task("base", "tiny"))
    figures = found.figures
    assert found.failed is None and figures["parameters"] == 960_256
    assert figures["wrapped"] > 0.5 and figures["over_refusal"] == 0.0
    assert figures["groups"] == {
        kind: list(range(8)) for kind in ("harmful", "borderline", "benign")
    }
    assert all(len(digits) == 8 for digits in figures["outcomes"]["attacks"].values())
    for name, rate in figures["by_attack"].items():
        digits = figures["outcomes"]["attacks"][name]
        assert rate == digits.count("1") / 8
    assert found.cost["peak_memory_bytes"] > 2**20
    assert figures["other_judges"] == {}


def test_what_another_judge_says(small: dict[str, Any]) -> None:
    """A model that answers with something else is no success to the one who knows the answer."""
    plan = Plan(**merged(small, judge="phrases,reference", evaluation={"max_new_tokens": 3}))
    figures = run_task(plan, Task("base", "tiny")).figures
    assert figures["wrapped"] > 0.5
    assert figures["other_judges"] == {"reference": {"bare": 0.0, "wrapped": 0.0}}


@pytest.mark.parametrize("arm", ["neurons", "lora_r1", "steering"])
def test_an_arm_is_the_same_again(small: dict[str, Any], arm: str) -> None:
    task = Task("main", "tiny", arm, 0)
    first, again = (run_task(Plan(**small), task) for _ in range(2))
    assert first.figures == again.figures and first.failed is None
    assert first.figures["kl"] >= 0.0 and first.cost["seconds"] >= first.cost["training_seconds"]
    assert (first.figures["trainable_parameters"] == 0) == (arm == "steering")


def test_the_knob_and_the_weight_have_an_effect(small: dict[str, Any]) -> None:
    plan, task = Plan(**small), Task("main", "tiny", "lora_r1", 0)
    figures = [
        run_task(plan, one).figures
        for one in (task, replace(task, knob=1e-4), replace(task, weight=5.0))
    ]
    losses = [one["history"][-1] for one in figures]
    assert losses[0] != losses[1] and losses[0] != losses[2]


def test_a_failing_arm_says_why(small: dict[str, Any]) -> None:
    plan = Plan(**merged(small, selecting={"z_threshold": 50.0}))
    found = run_task(plan, Task("main", "tiny", "neurons", 0))
    assert found.failed is not None and "SelectionError" in found.failed
    assert not found.figures


def test_where_no_step_improves_the_model_is_as_it_was(small: dict[str, Any]) -> None:
    """Of the neurons as of every other method."""
    wild = {
        "wild_neurons": {
            "method": "neurons",
            "update": "shared",
            "tuning": {"learning_rate": 1e4},
        },
        "wild_lora": {"method": "lora", "rank": 1, "learning_rate": 1e3},
    }
    stages: dict[str, Any] = {"anytime": {"behaviours": 4}, "robustness": {"steps": [1]}}
    plan = Plan(**merged(small, arms=list(wild), arm=wild, **stages))
    base = run_task(plan, Task("base", "tiny")).figures
    for arm in wild:
        found = run_task(plan, Task("main", "tiny", arm, 0))
        assert found.failed is None and found.is_unimproved
        figures = found.figures
        assert {key: figures[key] for key in ("outcomes", "by_attack")} == {
            key: base[key] for key in ("outcomes", "by_attack")
        }
        assert figures["kl"] == 0.0 and figures["trainable_parameters"] > 0
        assert figures["steps"] == 3 and len(figures["history"]) > 1
    curve = run_task(plan, Task("anytime", "tiny", "wild_neurons", 0)).figures["curve"]
    assert curve[-1] == {**curve[0], "step": curve[-1]["step"]}
    undone = run_task(plan, Task("robustness", "tiny", "wild_neurons", 0)).figures["robustness"]
    assert undone["treated"] == undone["base"] == undone["subtracted"]


def test_a_curve(small: dict[str, Any]) -> None:
    plan = Plan(**merged(small, anytime={"behaviours": 4}))
    found = run_task(plan, Task("anytime", "tiny", "lora_r1", 0))
    steps = [point["step"] for point in found.figures["curve"]]
    assert steps == [0, 1, 2, 3, 3]  # each, and what is kept in the end
    seconds = found.cost["seconds_of_curve"]
    assert len(seconds) == 5 and seconds == sorted(seconds)
    assert seconds[-1] == found.cost["seconds"]


@pytest.mark.parametrize("arm", ["full", "lora_r1"])
def test_undoing_begins_with_what_was_treated(small: dict[str, Any], arm: str) -> None:
    """Steps that change nothing leave the treated model, tied weights included."""
    settings = {"steps": [1], "behaviours": 8, "batch_size": 4, "learning_rate": 1e-30}
    tuning = {"max_steps": 6, "batch_size": 8, "validate_every": 1, "validation": 0.4}
    plan = Plan(**merged(small, arms=[arm], robustness=settings, tuning=tuning))
    task = Task("robustness", "tiny", arm, 0, 3e-3)
    found = run_task(plan, task).figures["robustness"]
    assert arm == "lora_r1" or found["treated"] != found["base"]
    (after,) = found["benign"]["curve"]
    assert {key: after[key] for key in found["treated"]} == found["treated"]


def test_undoing_leaves_the_model_as_it_was(small: dict[str, Any]) -> None:
    plan = Plan(**merged(small, robustness={"steps": [1, 2], "behaviours": 4, "batch_size": 4}))
    found = run_task(plan, Task("robustness", "tiny", "lora_r1", 0)).figures["robustness"]
    assert found["subtracted"] == found["base"]
    assert [point["step"] for point in found["harmful"]["curve"]] == [1, 2]
    assert set(found["benign"]) == {"curve", "undone_after", "applied_again"}
    assert run_task(plan, Task("robustness", "tiny", "steering", 0)).figures["robustness"] is None


def test_attack_success_means_the_same_in_a_curve(small: dict[str, Any]) -> None:
    """That of attacks alone: of the bare prompts this model refuses more."""
    plan = Plan(**merged(small, anytime={}))
    base = run_task(plan, Task("base", "tiny")).figures
    curve = run_task(plan, Task("anytime", "tiny", "lora_r1", 0)).figures["curve"]
    assert base["bare"] < base["wrapped"]
    assert curve[0]["attack_success"] == pytest.approx(base["wrapped"])


def test_undone_after() -> None:
    curve = [{"step": 1, "attack_success": 0.1}, {"step": 5, "attack_success": 0.5}]
    assert undone_after(curve, base=0.9, treated=0.1) == 5
    assert undone_after(curve, base=1.0, treated=0.2) is None
    assert undone_after(curve, base=0.1, treated=0.1) is None


def test_workers_run_it(small: dict[str, Any], tmp_path: Path) -> None:
    """Two processes, each run in a fork of its own, find what this process finds."""
    found = run_comparison(Plan(**merged(small, arms=["lora_r1"])), tmp_path / "out", workers=2)
    (own,) = [run for run in found.runs if run.task.stage == "main"]
    here = run_task(Plan(**small), own.task)
    assert own.outcome.figures == Outcome.from_json(json.loads(json.dumps(here.to_json()))).figures


COMPARE = """
import json, sys
from pathlib import Path
from nest.comparison.plan import Plan
from nest.comparison.run import run_comparison
run_comparison(Plan(**json.loads(Path(sys.argv[1]).read_text())), sys.argv[2], workers=2)
"""


@pytest.mark.slow
def test_real_runs_killed_five_times(small: dict[str, Any], tmp_path: Path) -> None:
    """Killed with -9 five times, with another number of workers: the same bytes in the end."""
    values = merged(small, arms=["neurons", "lora_r1"], seeds=[0, 1], robustness={"steps": [1]})
    run_comparison(Plan(**values), tmp_path / "whole", workers=1)
    (tmp_path / "plan.json").write_text(json.dumps(values))
    command = [sys.executable, "-c", COMPARE, str(tmp_path / "plan.json"), str(tmp_path / "killed")]
    kills, journal = 0, tmp_path / "killed.unfinished" / "journal.jsonl"
    for kept in range(1, 6):
        process = subprocess.Popen(command)
        while process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") >= kept:
                process.kill()
                kills += 1
                break
            time.sleep(0.05)
        process.wait()
    subprocess.run(command, check=True)
    assert kills == 5
    for name in ("results.json", "tables.md"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_worker_ends_with_whoever_asked(small: dict[str, Any]) -> None:
    """A comparison that is killed leaves no process behind."""
    plan = Plan(**merged(small, tuning={"epochs": 500, "batch_size": 8}))
    worker = subprocess.Popen(
        [sys.executable, "-m", "nest.comparison.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert worker.stdin is not None
    task = Task("main", "tiny", "lora_r1", 0).to_json()
    line = json.dumps({"plan": plan.values(), "task": task, "device": "cpu", "threads": 1})
    try:
        worker.stdin.write(line.encode() + b"\n")
        worker.stdin.close()  # as the system does for one that is killed
        # the interpreter's own ending, which takes seconds, has another code
        assert worker.wait(timeout=120) == 1
    finally:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        assert worker.stdout is not None
        worker.stdout.close()


def test_what_a_world_depends_on(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = Plan(**small)
    facts = facts_of(plan, material_of(plan, "tiny", final=False))
    assert set(facts.identity) == {"model", "training", "development"}
    other = {**small["world"]["tiny"], "system": "Be careful."}
    changed = Plan(**merged(small, world={"tiny": other}))
    then = facts_of(changed, material_of(changed, "tiny", final=False))
    assert facts.identity["model"] != then.identity["model"]
    assert facts.identity["development"]["groups"] == [list(range(8))] * 3


def test_near_twins_are_found_wherever_they_are_learned_from(small: dict[str, Any]) -> None:
    table = small["world"]["tiny"]
    other = {**table, "unsafe": table["development"]["harmful"]}
    plan = Plan(**merged(small, world={"tiny": other}))
    facts = facts_of(plan, material_of(plan, "tiny", final=False))
    assert facts.overlaps["development harmful in training unsafe"]["n"] == 8


def test_some_of_the_prompts(small: dict[str, Any]) -> None:
    table = {**small["world"]["tiny"], "prompts": 4}
    plan = Plan(**merged(small, world={"tiny": table}))
    cut = material_of(plan, "tiny", final=False).development
    assert cut.groups["harmful"] == (0, 1, 2, 3) and len(cut.benign) == 4


def test_a_world_of_ours_has_both_splits() -> None:
    plan = Plan(worlds=("bazaar",), arms=("neurons",))
    made = material_of(plan, "bazaar", final=True)
    assert made.test is not None
    development, test = made.development, made.test
    assert not set(development.harmful.conversations) & set(test.harmful.conversations)
    attacks = [{one.name for one in split.attacks} - {"none"} for split in (development, test)]
    assert len(attacks[0]) == len(attacks[1]) == 5 and not attacks[0] & attacks[1]
    for kind, prompts in test.sets().items():
        assert len(test.groups[kind]) == len(prompts)
    assert max(test.groups["harmful"]) + 1 == 40
    assert material_of(plan, "bazaar", final=False).test is None


def test_layers_that_leave_nothing(small: dict[str, Any]) -> None:
    other = {**small["world"]["tiny"], "layers": [40, 50]}
    with pytest.raises(InputError, match="leaves no site"):
        run_task(Plan(**merged(small, world={"tiny": other})), Task("main", "tiny", "neurons", 0))


def test_torch_is_left_as_it_was(small: dict[str, Any], faked: Callable[..., Path]) -> None:
    state = torch.random.get_rng_state()
    run_task(Plan(**small), Task("main", "tiny", "lora_r1", 0))
    assert torch.equal(state, torch.random.get_rng_state())
