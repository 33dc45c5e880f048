"""The command line on a real chat model, from selecting to reverting, as a user would go through it.

SmolLM2 with 135 million parameters and a few dozen prompts: what is asserted are facts of the machinery,
and that refusals become more frequent; ten steps on so few prompts make no model safe.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dialogues
import models
import pytest
import torch
from safetensors import safe_open

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
LOWEST, LAYERS = 15, 30
STEPS, N_ASKED = 10, 20
LIMIT_SECONDS = 600  # of one command; it is there to end what hangs


@dataclass
class Journey:
    """What each command said, and where it wrote.

    Attributes:
        model: The checkpoint it began with.
        folder: Of everything that was written.
        said: Each command's JSON.
        code: Each command's exit code.
        seconds: Wall time, loading torch and the model included.
    """

    model: Path
    folder: Path
    said: dict[str, dict[str, Any]] = field(default_factory=dict)
    code: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def nest(self, name: str, *arguments: object) -> None:
        """`nest ARGUMENTS --json` in a process of its own; its result is kept under `name`."""
        code = "from nest.cli.main import run\nrun()"
        paths = [str(ROOT), *(path for path in sys.path if path)]
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments), "--json"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            timeout=LIMIT_SECONDS,
        )
        self.seconds[name] = time.monotonic() - started
        self.code[name] = done.returncode
        assert done.stdout.count("\n") == 1, (name, done.stdout, done.stderr)
        self.said[name] = json.loads(done.stdout)

    def path(self, name: str) -> Path:
        return self.folder / name

    def rows(self, name: str, rows: Sequence[tuple[str, str]]) -> Path:
        """A file of dialogues."""
        path = self.path(f"{name}.jsonl")
        lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def prompts(self, name: str, prompts: Sequence[str]) -> Path:
        """A file of prompts."""
        path = self.path(f"{name}.txt")
        path.write_text("\n".join(prompts) + "\n", encoding="utf-8")
        return path

    def responses(self, name: str) -> list[dict[str, Any]]:
        """Every response of an evaluation."""
        path = self.path(name) / "eval.responses.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Journey:
    """Every command in the README's order."""
    started = time.monotonic()
    try:
        model = models.smollm2()
    except models.Unavailable as reason:
        pytest.skip(f"SmolLM2 is not there: {reason}")
    went = Journey(model, tmp_path_factory.mktemp("real"))
    went.seconds["model"] = time.monotonic() - started
    selection, patch, folded = map(went.path, ("selection", "patch", "folded"))
    refuse, answer = dialogues.to_refuse(), dialogues.to_answer()
    went.nest(
        *("select", "select", "--model", model, "--z", 3, "--out", selection),
        *("--unsafe", went.prompts("unsafe", [prompt for prompt, _ in refuse])),
        *("--safe", went.prompts("safe", [prompt for prompt, _ in answer])),
    )
    went.nest(
        *("tune", "tune", "--model", model, "--clusters", selection, "--out", patch),
        *("--harmful", went.rows("harmful", refuse), "--benign", went.rows("benign", answer)),
        *("--layers", f"{LOWEST}:", "--epochs", 9, "--max-steps", STEPS, "--batch-size", 8),
        *("--learning-rate", 0.05, "--validate-every", 5, "--validation", 0.15),
    )
    went.nest("fold", "fold", "--model", model, "--patch", patch, "--out", folded)
    compared = ("verify", "--model", model, "--patch", patch, "--folded")
    went.nest("verify", *compared, folded)
    went.nest("verify the base", *compared, model)
    went.nest(
        *("revert", "revert", "--model", folded, "--patch", patch),
        *("--out", went.path("reverted")),
    )
    n_harmful, n_benign = dialogues.N_HELD_OUT
    harmless = [
        *(prompt for prompt, _ in dialogues.BENIGN[-n_benign:]),
        *dialogues.BORDERLINE,
    ][: N_ASKED - n_harmful]
    asked = (
        *("--harmful", went.prompts("asked", dialogues.HARMFUL[-n_harmful:])),
        *("--borderline", went.prompts("harmless", harmless), "--max-new-tokens", 24),
    )
    for name, which in (
        ("eval base", (model,)),
        ("eval patched", (model, "--patch", patch)),
        ("eval folded", (folded,)),
    ):
        went.nest(name, "eval", *asked, "--out", went.path(name), "--model", *which)
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in went.seconds.items())
    print(f"SmolLM2, seconds: {stages}; together {sum(went.seconds.values()):.0f}")
    return went


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def changed_tensors(first: Path, second: Path) -> list[str]:
    """Tensors that differ between two checkpoints of one file each."""
    with (
        safe_open(first / "model.safetensors", "pt") as ours,
        safe_open(second / "model.safetensors", "pt") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys())
        names = sorted(ours.keys())
        return [n for n in names if not torch.equal(ours.get_tensor(n), theirs.get_tensor(n))]


def test_every_command_succeeds_but_the_comparison_that_should_not(journey: Journey) -> None:
    expected = {name: 1 if name == "verify the base" else 0 for name in journey.code}
    assert journey.code == expected


def test_select_finds_neurons_at_sites(journey: Journey) -> None:
    said = journey.said["select"]
    assert said["neurons"] >= said["clusters"] >= said["sites"] > 0
    # A few in a hundred lie beyond three deviations of their site's mean, of 30 x 2 x 1536.
    assert said["neurons"] < 0.05 * LAYERS * 2 * 1536
    assert 0.5 < said["probe_accuracy"]["mean"] <= 1.0


def test_tune_lowers_the_loss_on_what_it_has_not_seen(journey: Journey) -> None:
    said = journey.said["tune"]
    manifest = json.loads((journey.path("patch") / "manifest.json").read_text(encoding="utf-8"))
    history = manifest["provenance"]["tuning"]["history"]
    losses = [entry["validation_loss"] for entry in history]
    assert [entry["step"] for entry in history] == [0, 5, STEPS]
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses)
    assert all(torch.isfinite(torch.tensor(entry["train_loss"])) for entry in history[1:])
    assert said["validation_loss"] == min(losses) < losses[0] - 0.2
    assert said["steps"] == STEPS and said["best_step"] > 0
    assert 0 < said["trainable_parameters"] < 0.001 * 135e6


def test_fold_changes_rows_of_the_tuned_layers_only(journey: Journey) -> None:
    changed = changed_tensors(journey.model, journey.path("folded"))
    allowed = {
        f"model.layers.{layer}.mlp.{name}_proj.weight"
        for layer in range(LOWEST, LAYERS)
        for name in ("gate", "up")
    }
    assert changed and set(changed) <= allowed
    assert journey.said["fold"]["tensors_changed"] == len(changed)
    before, after = files(journey.model), files(journey.path("folded"))
    assert [name for name in before if before[name] != after[name]] == ["model.safetensors"]


def test_verify_tells_the_folded_checkpoint_from_the_base(journey: Journey) -> None:
    said = journey.said["verify"]
    assert said["ok"] and said["has_effect"]
    assert said["rows_changed"] == journey.said["fold"]["rows_changed"] > 0
    assert said["rows_outside_selection"] == said["tensors_changed_elsewhere"] == 0
    # The very bits of the model that carried the update.
    assert said["max_logit_difference"] == 0.0
    assert not journey.said["verify the base"]["ok"]


def test_revert_gives_every_file_back_to_the_byte(journey: Journey) -> None:
    assert files(journey.path("reverted")) == files(journey.model)


def test_eval_asks_every_prompt_and_gets_answers(journey: Journey) -> None:
    for name in ("eval base", "eval patched", "eval folded"):
        rows = journey.responses(name)
        assert len(rows) == N_ASKED
        for row in rows:
            assert len(row["response"].split()) >= 3, row
            assert "<|im_" not in row["response"]
    # The model as it comes talks; ten steps may leave it saying one sentence over and over.
    verdicts = [row["verdict"] for row in journey.responses("eval base")]
    assert verdicts.count("degenerate") <= 1


def test_the_folded_checkpoint_answers_as_the_patched_model(journey: Journey) -> None:
    assert journey.responses("eval folded") == journey.responses("eval patched")


def test_refusals_become_more_frequent(journey: Journey) -> None:
    before, after = (journey.said[f"eval {which}"]["refusal_rate"] for which in ("base", "folded"))
    assert before["n"] == after["n"] == dialogues.N_HELD_OUT[0]
    assert after["rate"] >= before["rate"] + 0.2
