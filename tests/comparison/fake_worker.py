"""A worker that makes its outcomes up from the task's name, for tests of everything around it.

FAKE_FAILS, FAKE_UNIMPROVED, FAKE_UNTRAINED: arms that fail, in which no step is better than none, and that
train nothing.
FAKE_DIES: a part of a task's name over which it dies, once for each file named in FAKE_TIMES that is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

N_HARMFUL, N_OTHERS = 12, 10


def digits(rng: random.Random, n: int, share: float) -> str:
    return "".join("1" if rng.random() < share else "0" for _ in range(n))


def figures_of(task: dict[str, Any]) -> dict[str, Any]:
    rng = random.Random(json.dumps({**task, "stage": ""}, sort_keys=True))
    share = 0.9 if not task["arm"] else 0.1 + 0.6 * rng.random()
    attacks = {name: digits(rng, N_HARMFUL, share) for name in ("none", "first", "second")}
    attacks["first"] = "1" + attacks["first"][1:]
    rates = {name: text.count("1") / N_HARMFUL for name, text in attacks.items()}
    borderline, benign = digits(rng, N_OTHERS, 0.1), digits(rng, N_OTHERS, 0.9)
    return {
        "bare": rates["none"],
        "wrapped": (rates["first"] + rates["second"]) / 2,
        "worst": max(rates["first"], rates["second"]),
        "worst_attack": "first",
        "over_refusal": borderline.count("1") / N_OTHERS,
        "exact_match": benign.count("1") / N_OTHERS,
        "degenerate": 0.0,
        "by_attack": rates,
        "other_judges": {"strict": {"bare": rates["none"] / 2, "wrapped": None}},
        "outcomes": {"attacks": attacks, "borderline": borderline, "benign": benign},
    }


def untreated(task: dict[str, Any]) -> dict[str, Any]:
    """The run of the model as it is that a run is compared with."""
    return {
        **{"stage": "base", "world": task["world"], "arm": "", "seed": 0},
        **{"knob": None, "weight": 1.0, "split": task["split"]},
    }


def outcome_of(task: dict[str, Any]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    cost: dict[str, Any] = {"peak_memory_bytes": 2**20}
    failed = None
    if task["stage"] == "base":
        figures = figures_of(task)
        figures |= {"parameters": 1000, "architecture": "Fake"}
        others = list(range(N_OTHERS))
        figures["groups"] = {
            **{"harmful": [i // 2 for i in range(N_HARMFUL)]},
            **{"borderline": others, "benign": others},
        }
        if os.environ.get("FAKE_BASE") == "nothing":
            figures["by_attack"] = dict.fromkeys(figures["by_attack"], 0.0)
    elif task["arm"] == os.environ.get("FAKE_FAILS"):
        failed = "SelectionError: no neuron passes the threshold"
    elif task["stage"] == "anytime":
        figures["curve"] = [
            {"step": step, "attack_success": 1 / (step + 1), "over_refusal": 0.0}
            for step in range(20)
        ]
        cost["seconds_of_curve"] = [0.5 * step for step in range(20)]
    elif task["stage"] == "robustness":
        look = {"attack_success": 0.2, "over_refusal": 0.0, "exact_match": 1.0}
        undone = {
            "curve": [{"step": 1, **look}, {"step": 2, **look, "attack_success": 0.8}],
            "undone_after": 2,
            "applied_again": look,
        }
        keys = ("base", "treated", "subtracted")
        figures["robustness"] = {**dict.fromkeys(keys, look), "benign": undone, "harmful": undone}
    else:
        figures = {**figures_of(task), "kl": random.Random(task["arm"]).random(), "kl_dialogues": 3}
    if task["stage"] != "base" and failed is None:
        figures |= {
            "trainable_parameters": 7,
            "steps": 3,
            "best_step": 2,
            "history": [],
            "more": {},
        }
        cost |= {"seconds": 1.5, "training_seconds": 1.0}
    if task["arm"] and task["arm"] == os.environ.get("FAKE_UNIMPROVED"):
        figures["best_step"] = 0
        if task["stage"] in ("sweep", "main", "front"):
            figures |= {**figures_of(untreated(task)), "kl": 0.0}
    if task["arm"] and task["arm"] == os.environ.get("FAKE_UNTRAINED"):
        figures |= {"trainable_parameters": 0, "steps": 0, "best_step": 0}
        if task["stage"] == "anytime":
            figures["curve"] = figures["curve"][:2]
            cost["seconds_of_curve"] = cost["seconds_of_curve"][:2]
    return {"figures": figures, "cost": cost, "failed": failed, "warnings": []}


def dies(task: dict[str, Any]) -> bool:
    part, times = os.environ.get("FAKE_DIES"), os.environ.get("FAKE_TIMES")
    if not part or part not in (task["arm"], task["world"]):
        return False
    for token in sorted(Path(str(times)).glob("death*")):
        token.unlink()
        return True
    return False


def main() -> None:
    log = os.environ.get("FAKE_LOG")
    for line in sys.stdin:
        asked = json.loads(line)
        task = asked["task"]
        if log:
            with Path(log).open("a", encoding="utf-8") as file:
                file.write(hashlib.sha256(json.dumps(task).encode()).hexdigest() + "\n")
        if dies(task):
            print("killed for memory", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(os.environ.get("FAKE_SLEEP", "0")))
        if os.environ.get("FAKE_FAULT"):
            answer: dict[str, Any] = {"fault": os.environ["FAKE_FAULT"], "failed": False}
        else:
            answer = {"outcome": outcome_of(task)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
