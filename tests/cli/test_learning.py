"""`nest select` with scorers that learn from dialogues, as users call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from driver import Nest, World

from nest.patches.patch import NeuronPatch
from nest.selection.config import LEARNING
from nest.selection.selection import NeuronSelection


def arguments(world: World, out: Path, scorer: str, *more: Any) -> list[object]:
    return [
        *("select", "--model", world.model, "--scorer", scorer, "--out", out),
        *("--harmful", world.data["harmful"], "--benign", world.data["benign"], *more),
    ]


@pytest.mark.parametrize("scorer", LEARNING)
def test_dialogues_alone_are_enough(scorer: str, world: World, nest: Nest, tmp_path: Path) -> None:
    done = nest(*arguments(world, tmp_path / "s", scorer, "--neurons", "10%", "--json"))
    assert done.code == 0, done.err
    selection = NeuronSelection.load(tmp_path / "s")
    assert done.json["neurons"] == selection.n_neurons == 10  # of 4 * 24
    assert selection.provenance["config"]["neurons"] == "10%"
    tuned = nest(
        *("tune", "--model", world.model, "--clusters", tmp_path / "s", "--out", tmp_path / "p"),
        *("--harmful", world.data["harmful"], "--benign", world.data["benign"]),
        *("--start", "zero_loadings", "--max-steps", "3", "--validation", "0.2"),
    )
    assert tuned.code == 0, tuned.err


def test_what_cannot_be_is_said(world: World, nest: Nest, tmp_path: Path) -> None:
    out = tmp_path / "s"
    plain = ["select", "--model", world.model, "--out", out]
    prompts = ["--unsafe", world.data["unsafe"], "--safe", world.data["safe"]]
    dialogues = ["--harmful", world.data["harmful"], "--benign", world.data["benign"]]
    for given, said in (
        ([*plain, *prompts, "--scorer", "learned"], "learns from dialogues"),
        ([*plain, *prompts, *dialogues, "--scorer", "probe"], "learns from prompts alone"),
        ([*plain, *dialogues[:2], "--scorer", "effect"], "dialogues come in two kinds"),
        ([*plain, *prompts, "--neurons", "0"], "neurons is 0; it must be a number from 1"),
        ([*plain, *prompts, "--neurons", "5", "--z", "2"], "give one of them"),
    ):
        done = nest(*given)
        assert done.code == 1 and said in done.err, done.err
        assert not out.exists()


def test_the_papers_way_is_one_flag(world: World, nest: Nest, tmp_path: Path) -> None:
    model, data = ("--model", world.model), world.data
    prompts = ("--unsafe", data["unsafe"], "--safe", data["safe"])
    dialogues = ("--harmful", data["harmful"], "--benign", data["benign"])
    for flag in ("--paper", ""):
        # of a model of 96 neurons none may be so far out
        given = ("--z", "1", "--scorer", "probe") if not flag else (flag,)
        done = nest("select", *model, *prompts, "--out", tmp_path / f"s{flag}", *given)
        assert done.code == 0 or "no neuron has a z-score over 3" in done.err
    done = nest("select", *model, *prompts, "--out", tmp_path / "x", "--paper", "--z", "2")
    assert done.code == 1
    assert "--paper sets z_threshold to 3.0, and z_threshold 2.0 was given" in done.err
    out = tmp_path / "p"
    done = nest(
        *("tune", *model, *dialogues, "--clusters", tmp_path / "s", "--out", out, "--paper"),
        *("--max-steps", "3", "--validation", "0.2"),
    )
    assert done.code == 0, done.err
    patch = NeuronPatch.load(out)
    record = patch.provenance["tuning"]["config"]
    assert (patch.update, record["epochs"], record["kl_weight"]) == ("shared", 5.0, 0.0)
    assert record["start"] is None
