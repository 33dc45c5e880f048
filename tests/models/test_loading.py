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
from nest.models.loading import check_checkpoint, is_local, load_model


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
