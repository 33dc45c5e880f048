"""Checkpoints load whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import build
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from nest.errors import InputError, MissingInputError
from nest.models.loading import check_checkpoint, is_local, load_model, stored_dtype


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    path = tmp_path / "model"
    build("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_loads_in_eval_mode_with_the_asked_dtype(folder: Path) -> None:
    model, tokenizer = load_model(folder, dtype="bfloat16", device="cpu")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert tokenizer.eos_token == "[EOS]"


def test_loaded_weights_are_the_saved_ones(folder: Path) -> None:
    model, _ = load_model(folder, device="cpu")
    for name, value in build("llama").state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_missing_folder_and_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="there is no folder"):
        load_model(tmp_path / "none")
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(tmp_path)


def test_a_truncated_shard_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged or cut short"):
        load_model(folder)


def test_weights_that_would_be_random_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 .*up_proj"):
        load_model(folder, device="cpu")


def test_other_formats_and_bad_config_and_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    build("llama").save_pretrained(bare)
    with pytest.raises(InputError, match="tokenizer"):
        load_model(bare, device="cpu")
    bad = shutil.copytree(folder, tmp_path / "bad")
    (bad / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        load_model(bad, device="cpu")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        load_model(folder)


def test_an_index_with_a_missing_shard_or_key(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    files = check_checkpoint(tmp_path)
    assert len(set(files.values())) > 1
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="lacks ghost"):
        check_checkpoint(tmp_path)
    content["weight_map"] = {"ghost": "nowhere.safetensors"}
    index.write_text(json.dumps(content))
    with pytest.raises(MissingInputError, match=r"nowhere\.safetensors"):
        check_checkpoint(tmp_path)
    index.write_text("[]")
    with pytest.raises(InputError, match="damaged"):
        check_checkpoint(tmp_path)


def test_unknown_options_are_named(folder: Path) -> None:
    with pytest.raises(InputError, match="unknown dtype 'int3'"):
        load_model(folder, dtype="int3")
    with pytest.raises(InputError, match="unknown device 'abacus'"):
        load_model(folder, device="abacus")


def test_what_looks_like_a_path_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("./a/b", "/a", "a/b/c", "~/x", "model", "runs/typo", Path("a/b"), "../x"):
        assert is_local(name), name
    assert not is_local("Qwen/Qwen3-4B")


# --- what transformers loads, and what is folded, are one checkpoint ----------------------------------


def edit_config(folder: Path, **entries: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_auto_is_the_files_dtype_whatever_the_config_says(
    folder: Path, stored: torch.dtype
) -> None:
    build("llama").to(stored).save_pretrained(folder)
    edit_config(folder, dtype="float16")
    model, _ = load_model(folder, device="cpu")
    assert {p.dtype for p in model.parameters()} == {stored}
    assert stored_dtype(folder) == stored


def test_two_sets_of_weights_are_refused(folder: Path) -> None:
    single = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    build("llama").save_pretrained(folder, max_shard_size="20KB")
    check_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(single)
    with pytest.raises(InputError, match="two sets of weights"):
        load_model(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    build("llama").save_pretrained(folder, max_shard_size="20KB")
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    tensors = load_file(second)
    name = next(iter(tensors))
    save_file({**load_file(first), name: tensors[name] + 1}, first, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{name} is in several shards"):
        check_checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("adapter_config.json", "{}", "holds an adapter"),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        ("tokenizer.json", '{"version": "9", "model": {"type": "New"}}', "has no tokenizer"),
        ("config.json", "[]", "holds a list; expected a JSON object"),
    ],
)
def test_files_that_other_tools_wrote(folder: Path, file: str, content: str, said: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(InputError, match=said):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    "entries",
    [
        {"hidden_size": "16"},
        {"num_hidden_layers": None},
        {"intermediate_size": [24]},
        {"rope_parameters": 3},
        {"vocab_size": -1},
        {"model_type": 7},
        {"transformers_weights": "other.safetensors"},
    ],
    ids=str,
)
def test_a_config_of_wrong_types_is_a_sentence(folder: Path, entries: dict[str, object]) -> None:
    edit_config(folder, **entries)
    with pytest.raises(InputError, match=r"could not be loaded|names its weights"):
        load_model(folder, device="cpu")


def test_what_plays_no_part_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="is a folder and has none"):
        load_model(folder, revision="v1")
    with pytest.raises(InputError, match="give one of them"):
        load_model(folder, device="cpu", device_map="auto")
