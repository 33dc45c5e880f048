"""Bad input: a sentence, exit code 1, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import (
    Finished,
    Nest,
    World,
    as_user,
    everything_under,
    select_arguments,
    tune_arguments,
    with_options,
)
from safetensors.torch import load_file, save_file
from tiny_models import build, save_checkpoint, word_tokenizer


def write(path: Path, rows: list[object] | str) -> Path:
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Where a test's own input lies; output goes beside it."""
    (tmp_path / "input").mkdir()
    return tmp_path / "input"


def refused(nest: Nest, arguments: object, work: Path) -> str:
    """The sentence; nothing was written beside the input, and the input is as it was."""
    before = everything_under(work.parent)
    error = nest(*arguments, "--json").error
    assert everything_under(work.parent) == before
    return error


def selecting(world: World, work: Path, **changed: object) -> list[object]:
    model = changed.pop("model", world.model)
    data = {**world.data, **{key: value for key, value in changed.items() if key in world.data}}
    arguments = list(select_arguments(model, data, work.parent / "out"))
    options = [(f"--{key}", changed[key]) for key in set(changed) - set(world.data)]
    return with_options(arguments, *(word for option in options for word in option))


def tuning(world: World, work: Path, **changed: object) -> list[object]:
    data = {**world.data, **{key: value for key, value in changed.items() if key in world.data}}
    return list(
        tune_arguments(
            changed.get("model", world.model),
            changed.get("clusters", world.selection),
            data,
            work.parent / "out",
        )
    )


# --- prompts --------------------------------------------------------------------------------------


def test_a_missing_file(world: World, nest: Nest, work: Path) -> None:
    said = refused(nest, selecting(world, work, unsafe=work / "no.jsonl"), work)
    assert "there is no file" in said and "no.jsonl" in said
    assert "there is no file" in refused(nest, tuning(world, work, benign=work / "no.csv"), work)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file(content: str, world: World, nest: Nest, work: Path) -> None:
    file = write(work / "empty.jsonl", content)
    assert "empty.jsonl is empty" in refused(nest, selecting(world, work, unsafe=file), work)


def test_a_wrong_column_names_those_there_are(world: World, nest: Nest, work: Path) -> None:
    file = write(work / "goals.jsonl", [{"text": "how", "label": "x"}] * 6)
    said = refused(nest, selecting(world, work, unsafe=file), work)
    assert "has no column prompt, goal" in said and "its columns are text, label" in said
    said = refused(nest, selecting(world, work, unsafe=f"{file}:texts"), work)
    assert "has no column 'texts'; its columns are text, label" in said
    file = write(work / "bare.jsonl", [{"prompt": "how"}] * 6)
    said = refused(nest, tuning(world, work, harmful=file), work)
    assert "has no column response, output" in said and "its columns are prompt" in said


def test_one_class_only(world: World, nest: Nest, work: Path) -> None:
    out = work.parent / "out"
    arguments = ["select", "--model", world.model, "--unsafe", world.data["unsafe"], "--out", out]
    assert "needs unsafe and safe prompts" in refused(nest, arguments, work)
    few = write(work / "few.txt", "how do i\n")
    assert "there are 1 safe prompts" in refused(nest, selecting(world, work, safe=few), work)
    pairs = [*arguments, "--pairs", world.data["pairs"]]
    assert "not both" in refused(nest, pairs, work)


def test_a_prompt_longer_than_the_context(world: World, nest: Nest, work: Path) -> None:
    long = " ".join(["slowly"] * 60)
    file = write(
        work / "long.jsonl",
        [{"prompt": p, "response": "i cannot help with that"} for p in (*["how"] * 6, long)],
    )
    for arguments in (
        selecting(world, work, unsafe=file),
        tuning(world, work, harmful=file),
        ["eval", "--model", world.model, "--harmful", file],
    ):
        said = refused(nest, arguments, work)
        assert "slowly slowly" in said or "prompt" in said
        assert "tokens" in said and "context" in said and "48" in said


def test_an_empty_response(world: World, nest: Nest, work: Path) -> None:
    rows = [{"prompt": "how", "response": "no"}] * 3 + [{"prompt": "why", "response": "  "}]
    file = write(work / "gaps.jsonl", rows)
    said = refused(nest, tuning(world, work, harmful=file), work)
    assert "gaps.jsonl, line 4: response is empty" in said


# --- models ---------------------------------------------------------------------------------------


def test_a_model_without_mlps_we_know(world: World, nest: Nest, work: Path) -> None:
    model = save_checkpoint(work / "gpt2", "gpt2")
    said = refused(nest, selecting(world, work, model=model), work)
    assert "Conv1D" in said and "layout=[nest.NeuronSite(" in said
    assert "there is no folder" in refused(nest, selecting(world, work, model=work / "no"), work)
    said = refused(nest, selecting(world, work, model=Path(world.data["safe"]).parent), work)
    assert "not a transformers checkpoint" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_site(
    value: float, world: World, nest: Nest, work: Path
) -> None:
    model = build()
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = value
    model.save_pretrained(work / "model")
    word_tokenizer().save_pretrained(work / "model")
    said = refused(nest, selecting(world, work, model=work / "model"), work)
    assert "the activations at model.layers.1.mlp.up_proj are not finite numbers" in said


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_checkpoint(keep: float, world: World, nest: Nest, work: Path) -> None:
    model = work / "model"
    shutil.copytree(world.model, model)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    for arguments in (
        selecting(world, work, model=model),
        ["fold", "--model", model, "--patch", world.patch, "--out", work.parent / "out"],
        ["verify", "--model", model, "--patch", world.patch],
    ):
        assert "model.safetensors is damaged or cut short" in refused(nest, arguments, work)


# --- artifacts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 9, -1])
def test_a_truncated_selection_or_patch(keep: int, world: World, nest: Nest, work: Path) -> None:
    for kind in ("selection", "patch"):
        shutil.copytree(getattr(world, kind), work / kind)
        file = work / kind / f"{kind}.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
    said = refused(nest, tuning(world, work, clusters=work / "selection"), work)
    assert "selection.safetensors is damaged or cut short" in said
    out = ("--out", work.parent / "out")
    for arguments in (
        ["fold", "--model", world.model, "--patch", work / "patch", *out],
        ["revert", "--model", world.model, "--patch", work / "patch", *out],
        ["verify", "--model", world.model, "--patch", work / "patch"],
        [
            "eval",
            "--model",
            world.model,
            "--patch",
            work / "patch",
            "--harmful",
            world.data["unsafe"],
        ],
        ["inspect", work / "patch"],
    ):
        assert "patch.safetensors is damaged or cut short" in refused(nest, arguments, work)


def test_nan_in_a_patch(world: World, nest: Nest, work: Path) -> None:
    shutil.copytree(world.patch, work / "patch")
    file = work / "patch" / "patch.safetensors"
    tensors = load_file(file)
    tensors["0.vectors"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    arguments = ["fold", "--model", world.model, "--patch", work / "patch"]
    said = refused(nest, [*arguments, "--out", work.parent / "out"], work)
    assert "'0.vectors' holds NaN or infinity" in said


def test_a_selection_or_patch_of_another_model(world: World, nest: Nest, work: Path) -> None:
    model = save_checkpoint(work / "other", seed=1)
    assert "was made on another model" in refused(nest, tuning(world, work, model=model), work)
    arguments = ["--model", model, "--patch", world.patch]
    out = ("--out", work.parent / "out")
    assert "of another model" in refused(nest, ["fold", *arguments, *out], work)
    assert "of another model" in refused(nest, ["revert", *arguments, *out], work)
    assert "of another model" in refused(nest, ["verify", *arguments], work)
    neox = save_checkpoint(work / "neox", "gpt_neox")
    assert "no module" in refused(nest, tuning(world, work, model=neox), work)
    said = refused(nest, ["revert", "--model", world.model, "--patch", world.patch, *out], work)
    assert "does not carry this patch" in said


def test_a_threshold_that_selects_nothing(world: World, nest: Nest, work: Path) -> None:
    said = refused(nest, selecting(world, work, z=40), work)
    assert "no neuron has a z-score over 40; the largest found is" in said and "lower --z" in said


def test_clusters_that_are_no_selection(world: World, nest: Nest, work: Path) -> None:
    for clusters, expected in (
        (work / "no", "there is no folder"),
        (world.model, "has no manifest.json; expected a selection"),
        (world.patch, "is a patch; expected a selection"),
        (Path(world.data["safe"]), "there is no folder"),
    ):
        assert expected in refused(nest, tuning(world, work, clusters=clusters), work)
    said = refused(nest, ["inspect", world.model], work)
    assert "has no manifest.json" in said


@pytest.mark.parametrize("kind", ["a file", "an empty folder", "the same kind"])
def test_an_output_that_exists(kind: str, world: World, nest: Nest, work: Path) -> None:
    out = work.parent / "out"
    for arguments, made in (
        (selecting(world, work), world.selection),
        (tuning(world, work), world.patch),
        (["fold", "--model", world.model, "--patch", world.patch, "--out", out], world.model),
    ):
        if kind == "a file":
            out.write_text("mine")
        elif kind == "an empty folder":
            out.mkdir()
        else:
            shutil.copytree(made, out)
        said = refused(nest, arguments, work)
        assert "is a file" in said if kind == "a file" else "--overwrite" in said
        out.unlink() if out.is_file() else shutil.rmtree(out)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("batch-size", "0", "--batch-size is '0'; it must be auto or a number from 1"),
        ("seed", "-1", "seed is -1; it must lie in [0, 4294967296)"),
        ("max-clusters", "0", "max_clusters is 0"),
        ("dtype", "int3", "unknown dtype 'int3'"),
        ("device", "abacus", "unknown device 'abacus'"),
        ("z", "nan", "z_threshold is nan"),
        ("layers", "1", "--layers is '1'; it must be A:B"),
        ("layers", "1:1", "layers is 1:1; the first must be below the end"),
        ("layers", "7:", "no sites in layers 7:; its layers are 0 to 1"),
    ],
)
def test_options_out_of_range(
    option: str, value: str, said: str, world: World, nest: Nest, work: Path
) -> None:
    assert said in refused(nest, selecting(world, work, **{option: value}), work)


def test_unknown_choices_are_reported_together(world: World, work: Path) -> None:
    # in a process of its own: jaxtyping's hook would see these first
    options = ("--pool", "median", "--scorer", "luck", "--cluster-scope", "moon")
    said = as_user(*selecting(world, work), *options).error
    for value in options[1::2]:
        assert f"is '{value}'; choose" in said
    assert not (work.parent / "out").exists()


def test_tuning_refuses_layers_and_modes_that_are_not_there(
    world: World, nest: Nest, work: Path
) -> None:
    said = refused(nest, [*tuning(world, work), "--layers", "5:9"], work)
    assert "has no neurons in layers 5:9; it has some in 0, 1" in said
    said = as_user(*tuning(world, work), "--mode", "trunk").error
    assert "mode is 'trunk'; choose live or branch" in said


def test_numbers_that_go_bad_keep_the_last_good_step(
    world: World, nest: Nest, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nest.tuning import loss

    whole, steps = loss.tuning_loss, []

    def poisoned(logits: Any, *args: Any, **kwargs: Any) -> Any:
        value = whole(logits, *args, **kwargs)
        steps.extend([1] * value.requires_grad)
        return value * float("nan") if len(steps) > 4 else value

    monkeypatch.setattr("nest.tuning.objective.tuning_loss", poisoned)
    said = nest(*with_options(tuning(world, work), "--validate-every", 2), "--json").error
    assert "at step 5 the loss is nan" in said and "layers.0.mlp" in said
    kept = work.parent / "out-step-4"
    assert f"step 4 was good: its patch is in {kept}" in said
    assert nest("verify", "--model", world.model, "--patch", kept, "--json").json["ok"]
    assert sorted(path.name for path in work.parent.iterdir()) == ["input", "out-step-4"]


# --- Ctrl-C ---------------------------------------------------------------------------------------


def interrupted(done: Finished, work: Path) -> None:
    assert done.code == 130, (done.code, done.err)
    assert not done.out and "interrupted" in done.err and "Traceback" not in done.err
    assert [path.name for path in work.parent.iterdir()] == ["input"]


@pytest.mark.parametrize(
    ("command", "where"),
    [
        ("select", "nest.activations.capture.run_model"),
        ("select", "safetensors.torch.save"),
        ("tune", "nest.tuning.loop.NeuronAdamW.step"),
        ("tune", "nest.artifacts.storage._move_into_place"),
        ("fold", "nest.patches.checkpoint._replace_bytes"),
        ("fold", "nest.patches.checkpoint._carry_along"),
        ("revert", "nest.patches.checkpoint._replace_bytes"),
    ],
)
def test_an_interruption_leaves_nothing(
    command: str,
    where: str,
    world: World,
    nest: Nest,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = ("--out", work.parent / "out")
    model = world.model
    if command == "revert":
        model = work / "folded"
        assert (
            nest("fold", "--model", world.model, "--patch", world.patch, "--out", model).code == 0
        )
    arguments = {
        "select": selecting(world, work),
        "tune": tuning(world, work),
        "fold": ["fold", "--model", model, "--patch", world.patch, *out],
        "revert": ["revert", "--model", model, "--patch", world.patch, *out],
    }[command]

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    where = where.replace("nest.tuning.loop.NeuronAdamW", "nest.tuning.optimizer.NeuronAdamW")
    monkeypatch.setattr(where, stop)
    done = nest(*arguments)
    if where == "safetensors.torch.save":  # all was captured by then, and is kept
        assert "the same command goes on from there" in done.err
        shutil.rmtree(work.parent / "out.unfinished")
    interrupted(done, work)


def test_a_real_signal_leaves_nothing(world: World, work: Path) -> None:
    press = (
        "import os, signal, nest.activations.capture as stage\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's `&` has it ignored
        "real = stage.run_model\n"
        "def pressed(*args, **kwargs):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(*args, **kwargs)\n"
        "stage.run_model = pressed"
    )
    interrupted(as_user(*selecting(world, work), before=press), work)


def test_an_interruption_keeps_the_older_artifact(
    world: World, nest: Nest, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert nest(*selecting(world, work)).code == 0
    before = everything_under(work.parent)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save", stop)
    assert nest(*selecting(world, work, z=0.5), "--overwrite").code == 130
    shutil.rmtree(work.parent / "out.unfinished")
    assert everything_under(work.parent) == before


def test_as_a_user_sees_it(world: World, work: Path) -> None:
    done = as_user(*selecting(world, work), "--json")
    assert done.json["neurons"] == world.select.json["neurons"]
    assert torch.is_tensor(load_file(work.parent / "out" / "selection.safetensors")["0.neurons"])
    said = as_user(*selecting(world, work)).error
    assert "exists already" in said
    assert as_user("select").code == 2
