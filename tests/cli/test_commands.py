"""Every subcommand through the real entry point: help, results, exit codes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import (
    COMMANDS,
    Nest,
    World,
    as_user,
    everything_under,
    select_arguments,
    tune_arguments,
    with_options,
)
from tiny_models import save_checkpoint

import nest as package
from nest.models.loading import load_weights
from nest.patches.patch import NeuronPatch
from nest.selection.selection import NeuronSelection

HELPS = [(name,) for name in COMMANDS] + [("organism", "export"), ("organism", "build")]


@pytest.mark.parametrize("command", [(), ("organism",), *HELPS])
def test_help_ends_in_an_example_that_parses(command: tuple[str, ...], nest: Nest) -> None:
    done = nest(*command, "--help")
    assert done.code == 0 and not done.err
    if command == ("organism",):
        return
    text = " ".join(done.out.split())
    assert "Example: nest" in text
    example = shlex.split(text.rsplit("Example: ", 1)[1])
    assert example[0] == "nest" and tuple(example[1 : 1 + len(command)]) == command
    options = {word for word in example if word.startswith("--")}
    assert options <= set(done.out.replace(",", " ").split()), "an option of the example is unknown"


@pytest.mark.parametrize("arguments", [("--help",), ("select", "--help"), ("--version",)])
def test_help_needs_no_heavy_imports(arguments: tuple[str, ...]) -> None:
    spy = (
        "import atexit, sys; heavy = {'torch', 'transformers', 'sklearn', 'matplotlib', 'pandas'};"
        "atexit.register(lambda: heavy & set(sys.modules) and print('HEAVY', file=sys.stderr))"
    )
    done = as_user(*arguments, before=spy)
    assert done.code == 0 and not done.err
    if arguments == ("--version",):
        assert done.out == f"nest {package.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("nothing",),
        ("select",),
        ("select", "--model", "m", "--out", "o", "--nothing"),
        ("select", "--model", "m", "--out", "o", "--z", "three"),
        ("tune", "--model", "m"),
        ("inspect",),
        ("organism", "nothing"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...], nest: Nest) -> None:
    done = nest(*arguments)
    assert done.code == 2 and not done.out and done.err


def test_select(world: World) -> None:
    found = world.select.json
    assert set(found) == {
        *("selection", "sites", "neurons", "clusters", "trainable_parameters"),
        *("fraction_of_model", "probe_accuracy", "silhouette", "seconds"),
    }
    assert set(found["probe_accuracy"]) == {"mean", "min"} and set(found["silhouette"]) == {"mean"}
    selection = NeuronSelection.load(world.selection)
    assert found["selection"] == str(world.selection)
    assert found["neurons"] == selection.n_neurons and found["clusters"] == selection.n_clusters
    assert found["trainable_parameters"] == selection.trainable_parameters("shared")
    n = sum(p.numel() for p in load_weights(world.model, device="cpu").parameters())
    assert found["fraction_of_model"] == pytest.approx(found["trainable_parameters"] / n)


def test_tune(world: World) -> None:
    found = world.tune.json
    assert {
        *("patch", "trainable_parameters", "fraction_of_model", "steps", "train_loss"),
        *("validation_loss", "seconds", "tokens_per_second"),
    } <= set(found)
    patch = NeuronPatch.load(world.patch)
    assert found["trainable_parameters"] == patch.trainable_parameters and found["steps"] == 6
    assert found["validation_loss"] == pytest.approx(
        patch.provenance["tuning"]["best_validation_loss"]
    )
    assert (world.patch / "README.md").read_text()


@pytest.mark.parametrize("with_patch", [False, True])
def test_eval(with_patch: bool, world: World, nest: Nest, tmp_path: Path) -> None:
    arguments = [
        *("eval", "--model", world.model, "--harmful", world.data["harmful"]),
        *("--borderline", world.data["safe"], "--benign", world.data["benign"]),
        *("--attacks", "none,base64,uppercase", "--max-new-tokens", 4, "--out", tmp_path / "eval"),
    ]
    found = nest(*arguments, "--json", *(["--patch", world.patch] * with_patch)).json
    success = found["attack_success_rate"]
    assert {"mean", "ci95", "n", "by_attack"} <= set(success)
    assert set(success["by_attack"]) == {"none", "base64", "uppercase"}
    assert success["mean"] == pytest.approx(sum(success["by_attack"].values()) / 3)
    assert success["ci95"][0] <= success["mean"] <= success["ci95"][1]
    assert {"rate", "ci95", "n"} <= set(found["over_refusal_rate"])
    assert {"exact_match", "n", "kl_to_base"} <= set(found["utility"])
    assert (found["utility"]["kl_to_base"] is not None) == with_patch
    assert found["judge"] == "phrases"
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["judge"] == "phrases"


def test_eval_by_either_engine(world: World, nest: Nest) -> None:
    arguments = ("eval", "--model", world.model, "--harmful", world.data["harmful"])
    arguments += ("--max-new-tokens", 4)
    found = [nest(*arguments, "--engine", engine, "--json").json for engine in ("static", "paged")]
    assert found[0]["attack_success_rate"] == found[1]["attack_success_rate"]


def test_eval_refuses_a_used_folder_before_it_starts(
    world: World, nest: Nest, tmp_path: Path
) -> None:
    (tmp_path / "eval.json").write_text("{}")
    arguments = ("eval", "--model", tmp_path / "no model", "--harmful", world.data["harmful"])
    assert "eval.json exists already" in nest(*arguments, "--out", tmp_path).error


def test_fold_verify_and_revert(world: World, nest: Nest, tmp_path: Path) -> None:
    model, patch = ("--model", world.model), ("--patch", world.patch)
    folded, back = tmp_path / "folded", tmp_path / "back"
    found = nest("fold", *model, *patch, "--out", folded, "--json").json
    loaded = NeuronPatch.load(world.patch)
    assert found["out"] == str(folded)
    assert found["tensors_changed"] == len(loaded.folded)
    assert found["rows_changed"] == loaded.n_rows
    for extra in ((), ("--folded", folded)):
        verified = nest("verify", *model, *patch, *extra, "--json").json
        assert set(verified) == {
            *("ok", "rows_changed", "rows_outside_selection", "tensors_changed_elsewhere"),
            *("max_logit_difference", "has_effect"),
        }
        assert verified["ok"] and verified["has_effect"]
        assert verified["rows_outside_selection"] == verified["tensors_changed_elsewhere"] == 0
        assert verified["max_logit_difference"] == 0.0
    found = nest("revert", "--model", folded, *patch, "--out", back, "--json").json
    assert set(found) >= {"out", "tensors_changed", "rows_changed"}
    assert everything_under(back) == everything_under(world.model)


def test_verify_fails_with_exit_code_1_where_it_does_not_hold(
    world: World, nest: Nest, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    arguments = ("--model", world.model, "--patch", world.patch)
    nest("fold", *arguments, "--out", tmp_path / "folded")
    file = tmp_path / "folded" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    done = nest("verify", *arguments, "--folded", tmp_path / "folded", "--json")
    assert done.code == 1
    found = json.loads(done.out)
    assert not found["ok"] and found["tensors_changed_elsewhere"] == 1
    assert done.err.startswith("error: ")


@pytest.mark.parametrize("kind", ["selection", "patch"])
def test_inspect(kind: str, world: World, nest: Nest, tmp_path: Path) -> None:
    artifact = getattr(world, kind)
    found = nest("inspect", artifact, "--plots", tmp_path / "plots", "--json").json
    assert found["kind"] == kind
    assert found["neurons"] == world.select.json["neurons"]
    assert (
        sum(n for layer in found["neurons_by_layer"].values() for n in layer.values())
        == (found["neurons"])
    )
    assert found["plots"]
    for path in found["plots"]:
        assert "<svg" in Path(path).read_text()
    plain = nest("inspect", artifact)
    assert plain.code == 0 and str(found["neurons"]) in plain.out


def test_tables_without_json_and_progress_on_stderr_only(
    world: World, nest: Nest, tmp_path: Path
) -> None:
    done = nest(*select_arguments(world.model, world.data, tmp_path / "s"))
    assert done.code == 0 and f"wrote {tmp_path}" in done.out.replace("\n", "")
    assert "{" not in done.out
    found = NeuronSelection.load(tmp_path / "s")
    assert found.n_neurons == world.select.json["neurons"]


def test_the_seed_decides_every_byte(world: World, nest: Nest, tmp_path: Path) -> None:
    assert nest(*select_arguments(world.model, world.data, tmp_path / "s"), "--json").code == 0
    name = "selection.safetensors"
    assert (tmp_path / "s" / name).read_bytes() == (world.selection / name).read_bytes()


def test_pairs_scope_scorer_and_clusters_anew(world: World, nest: Nest, tmp_path: Path) -> None:
    selection = tmp_path / "s"
    arguments = ("--model", world.model, "--pairs", world.data["pairs"], "--z", 0.5)
    options = ("--scorer", "contrast", "--cluster-scope", "layer", "--pool", "mean")
    found = nest("select", *arguments, *options, "--out", selection, "--json").json
    assert found["probe_accuracy"] == {"mean": None, "min": None}
    assert found["clusters"] <= 4
    tune = ("tune", "--model", world.model, "--clusters", selection, "--epochs", 9)
    tune = (*tune, "--harmful", world.data["harmful"], "--benign", world.data["benign"])
    tune = (*tune, "--max-steps", 6, "--learning-rate", 0.02, "--validate-every", 2)
    shared = nest(*tune, "--update", "shared", "--out", tmp_path / "a", "--json").json
    assert shared["trainable_parameters"] == found["trainable_parameters"]
    anew = nest(*tune, "--n-clusters", "1", "--update", "shared", "--out", tmp_path / "b", "--json")
    assert NeuronPatch.load(tmp_path / "b").selection.n_clusters == found["sites"]
    assert anew.code == 0


def test_overwriting_has_to_be_asked_for(world: World, nest: Nest, tmp_path: Path) -> None:
    arguments = select_arguments(world.model, world.data, tmp_path / "s")
    assert nest(*arguments).code == 0
    before = everything_under(tmp_path)
    assert "--overwrite" in nest(*arguments).error
    assert everything_under(tmp_path) == before
    assert nest(*with_options(arguments, "--z", "0.5"), "--overwrite").code == 0
    assert everything_under(tmp_path) != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    said = nest(*select_arguments(world.model, world.data, tmp_path / "mine"), "--overwrite").error
    assert "not overwritten" in said
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_tuning_in_branch_mode_on_some_layers_with_less_memory(
    world: World, nest: Nest, tmp_path: Path
) -> None:
    arguments = tune_arguments(world.model, world.selection, world.data, tmp_path / "patch")
    options = ("--mode", "branch", "--layers", "1:", "--checkpointing", "--no-cache-prefix")
    done = nest(*arguments, *options, "--micro-batch-size", 3, "--json")
    assert done.json["memory_estimate_bytes"] > 0
    refusals, memory = done.err.splitlines()
    assert refusals.startswith("responses: 24 of 24 to harmful prompts are refusals, 0 of 24")
    assert memory.startswith("memory: weights ") and "3 dialogues at a time" in memory
    patch = NeuronPatch.load(tmp_path / "patch")
    assert {part.site.layer for part in patch.selection.sites} == {1}
    config = patch.provenance["tuning"]["config"]
    assert (config["mode"], config["checkpointing"], config["layers"][0]) == ("branch", True, 1)
    assert patch.provenance["tuning"]["prefix_cached"] is False
    assert not nest(*arguments, "--overwrite", "--quiet", "--json").err


def test_selecting_in_some_layers(world: World, nest: Nest, tmp_path: Path) -> None:
    arguments = select_arguments(world.model, world.data, tmp_path / "selection")
    nest(*arguments, "--layers", ":1", "--json").json  # noqa: B018 - checks the exit code
    selection = NeuronSelection.load(tmp_path / "selection")
    assert {part.site.layer for part in selection.sites} == {0}


def test_a_dtype_can_be_asked_for(nest: Nest, world: World, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "half", dtype=torch.bfloat16)
    arguments = select_arguments(model, world.data, tmp_path / "s")
    assert nest(*arguments).code == 0
    assert NeuronSelection.load(tmp_path / "s").base.dtype == "bfloat16"
    assert nest(*arguments, "--dtype", "float32", "--overwrite").code == 0
    assert NeuronSelection.load(tmp_path / "s").base.dtype == "float32"


# --- TOML -----------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_config_file_gives_defaults_and_flags_win(
    world: World, nest: Nest, tmp_path: Path
) -> None:
    config = write(
        tmp_path / "nest.toml",
        f'model = "{world.model}"\n[select]\nunsafe = "{world.data["unsafe"]}"\n'
        f'safe = "{world.data["safe"]}"\nz = 0.5\ncluster-scope = "layer"\nmax_clusters = 1\n'
        "[tune]\nepochs = 3\n",
    )
    arguments = ("select", "--config", config, "--out", tmp_path / "s", "--overwrite")
    assert nest(*arguments).code == 0
    record: Any = NeuronSelection.load(tmp_path / "s").provenance["config"]
    assert (record["z_threshold"], record["cluster_scope"]) == (0.5, "layer")
    assert nest(*arguments, "--z", 0.75).code == 0
    record = NeuronSelection.load(tmp_path / "s").provenance["config"]
    assert (record["z_threshold"], record["max_clusters"]) == (0.75, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("zz = 2", "sets zz, which nest select does not know; its options are"),
        ("[select]\nthreshold = 2", "sets threshold, which nest select does not know"),
        ("[selct]\nz = 2", "has the table selct, which is no subcommand; there are"),
        ("z = ", "cannot be read as TOML"),
    ],
)
def test_a_config_file_with_a_mistake(
    text: str, said: str, world: World, nest: Nest, tmp_path: Path
) -> None:
    config = write(tmp_path / "nest.toml", text)
    arguments = select_arguments(world.model, world.data, tmp_path / "s")
    assert said in nest(*arguments, "--config", config).error
    assert not (tmp_path / "s").exists()
    assert "there is no file" in nest(*arguments, "--config", tmp_path / "no.toml").error
