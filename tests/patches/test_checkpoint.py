"""Folded checkpoints equal the live model, and reverted ones the source, byte for byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_patches import build, make_patch
from torch import nn

from nest.errors import InputError, OutputExistsError, PatchError
from nest.models.loading import check_checkpoint
from nest.patches.checkpoint import changed_keys, fold_checkpoint, revert_checkpoint
from nest.patches.patch import NeuronPatch
from nest.patches.verify import verify

FAMILIES = ("qwen3", "gpt_neox", "phi3", "gpt2")


def _save(model: nn.Module, folder: Path, *, shards: bool) -> None:
    model.save_pretrained(folder, max_shard_size="8KB" if shards else "1GB")
    (folder / "README.md").write_text("card")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("kept")
    (folder / "pytorch_model.bin").write_text("stale")


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([[1, 5, 9, 11]])).logits
    return logits


def _load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.eval()


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_fold_equals_live_and_revert_equals_source(
    family: str, dtype: torch.dtype, shards: bool, tmp_path: Path
) -> None:
    source, folded, back = tmp_path / "source", tmp_path / "folded", tmp_path / "back"
    _save(build(family, dtype), source, shards=shards)
    model = _load(source)
    patch = make_patch(model, family)
    result = fold_checkpoint(source, patch, folded)
    assert (result.tensors_changed, result.rows_changed) == (len(patch.folded), patch.n_rows)
    assert result.left_out == ("pytorch_model.bin",)
    patch.fold_into(model)
    assert torch.equal(_logits(_load(folded)), _logits(model))
    assert len(changed_keys(source, folded)) == result.tensors_changed

    revert_checkpoint(folded, patch, back)
    files = {p.relative_to(source) for p in source.rglob("*") if p.is_file()}
    for file in files - {Path("pytorch_model.bin")}:
        assert (back / file).read_bytes() == (source / file).read_bytes()
    assert (len(set(check_checkpoint(folded).values())) > 1) == shards


def test_metadata_is_kept(tmp_path: Path) -> None:
    model = build()
    _save(model, tmp_path / "a", shards=False)
    file = tmp_path / "a" / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "author": "me"})
    fold_checkpoint(tmp_path / "a", make_patch(model), tmp_path / "b")
    with safe_open(tmp_path / "b" / "model.safetensors", framework="pt") as reader:
        assert reader.metadata() == {"format": "pt", "author": "me"}


def test_a_backbones_own_names_are_found_by_content(tmp_path: Path) -> None:
    model = build("gpt_neox")
    _save(model, tmp_path / "a", shards=False)
    file = tmp_path / "a" / "model.safetensors"
    renamed = {key.removeprefix("gpt_neox."): value for key, value in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    patch = make_patch(model, "gpt_neox")
    fold_checkpoint(tmp_path / "a", patch, tmp_path / "b")
    folded = load_file(tmp_path / "b" / "model.safetensors")
    key = "layers.0.mlp.dense_h_to_4h.weight"
    assert torch.equal(folded[key], patch.fold_tensor("gpt_neox." + key, renamed[key]))


def test_each_wrong_checkpoint_has_its_sentence(tmp_path: Path) -> None:
    model = build()
    patch = make_patch(model)
    _save(model, tmp_path / "a", shards=False)
    fold_checkpoint(tmp_path / "a", patch, tmp_path / "folded")
    _save(build(dtype=torch.bfloat16), tmp_path / "half", shards=False)
    _save(build(seed=1), tmp_path / "other", shards=False)
    _save(build("gpt_neox"), tmp_path / "neox", shards=False)
    for name, said in (
        ("folded", "carries this patch already"),
        ("half", "are bfloat16"),
        ("other", "of another model"),
        ("neox", "has no tensor model.layers.0"),
    ):
        with pytest.raises(PatchError, match=said):
            fold_checkpoint(tmp_path / name, patch, tmp_path / "out")
    with pytest.raises(PatchError, match="does not carry"):
        revert_checkpoint(tmp_path / "a", patch, tmp_path / "out")
    with pytest.raises(InputError, match="overlap"):
        fold_checkpoint(tmp_path / "a", patch, tmp_path / "a" / "out")
    with pytest.raises(OutputExistsError):
        fold_checkpoint(tmp_path / "a", patch, tmp_path / "other")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
    fold_checkpoint(tmp_path / "a", patch, tmp_path / "other", overwrite=True)
    assert not changed_keys(tmp_path / "folded", tmp_path / "other")


def test_verify_in_memory(model: nn.Module, patch: NeuronPatch) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = verify(model, patch)
    assert found.to_json() == {
        "ok": True,
        "rows_changed": 16,
        "rows_outside_selection": 0,
        "tensors_changed_elsewhere": 0,
        "max_logit_difference": 0.0,
        "has_effect": True,
    }
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    idle = make_patch(model, scale=0.0)
    found = verify(model, idle)
    assert not found.has_effect and not found.ok and found.rows_changed == 0


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, NeuronPatch]:
    model = build("gpt_neox")
    _save(model, tmp_path / "a", shards=True)
    patch = make_patch(model, "gpt_neox")
    fold_checkpoint(tmp_path / "a", patch, tmp_path / "b")
    return tmp_path / "a", tmp_path / "b", patch


def _change(folder: Path, key: str, row: int) -> None:
    file = check_checkpoint(folder)[key]
    tensors = load_file(file)
    tensors[key][row] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def test_verify_needs_no_tokenizer_and_knows_tied_weights(tmp_path: Path) -> None:
    _save(build(), tmp_path / "a", shards=False)
    patch = make_patch(build())
    fold_checkpoint(tmp_path / "a", patch, tmp_path / "b")
    assert verify(str(tmp_path / "a"), patch, folded=tmp_path / "b", device="cpu").ok
    assert verify(tmp_path / "a", patch, device="cpu").ok


def test_verify_of_checkpoints(pair: tuple[Path, Path, NeuronPatch]) -> None:
    source, folded, patch = pair
    found = verify(source, patch, folded=folded, device="cpu")
    assert found.ok and found.rows_changed == 8 and found.max_logit_difference == 0.0


def test_verify_sees_rows_and_tensors_that_should_not_have_changed(
    pair: tuple[Path, Path, NeuronPatch],
) -> None:
    source, folded, patch = pair
    _change(folded, "gpt_neox.layers.0.mlp.dense_h_to_4h.weight", 0)
    _change(folded, "gpt_neox.layers.1.mlp.dense_4h_to_h.weight", 0)
    found = verify(source, patch, folded=folded, device="cpu")
    assert not found.ok
    assert (found.rows_outside_selection, found.tensors_changed_elsewhere) == (1, 1)
    assert found.max_logit_difference > 0.0
    with pytest.raises(InputError, match="folder"):
        verify(build("gpt_neox"), patch, folded=folded)


def test_other_weights_beside_the_models_are_left_out_by_name(
    patch: NeuronPatch, model: nn.Module, tmp_path: Path
) -> None:
    _save(model, tmp_path / "base", shards=False)
    weights = (tmp_path / "base" / "model.safetensors").read_bytes()
    strays = ("model.fp16.safetensors", "extra/model.safetensors", "other.safetensors")
    for name in strays:
        (tmp_path / "base" / name).write_bytes(weights)
    folded = fold_checkpoint(tmp_path / "base", patch, tmp_path / "folded")
    assert set(folded.left_out) == {*strays, "pytorch_model.bin"}
    assert not any((tmp_path / "folded" / name).exists() for name in strays)
    assert (tmp_path / "folded" / "extra" / "notes.txt").read_text() == "kept"


# --- a model on the Hub ---------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache: `main` holds newer weights than the revision `v1` that is tuned."""
    import huggingface_hub.constants as constants

    root = tmp_path / "hub" / "models--acme--tiny"
    for seed, commit, name in ((1, "a" * 40, "main"), (0, "b" * 40, "v1")):
        build(seed=seed).save_pretrained(root / "snapshots" / commit)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / name).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return root


def test_a_patch_goes_to_the_commit_it_was_made_on(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nest import api
    from nest.models.loading import load_weights

    model = load_weights("acme/tiny", revision="v1", device="cpu")
    origin = api.origin_of(model)
    assert (origin["model"], origin["revision"]) == ("acme/tiny", "b" * 40)
    made = make_patch(build())
    patch = replace(made, provenance=origin)
    fold_checkpoint("acme/tiny", patch, tmp_path / "folded")
    assert verify("acme/tiny", patch, folded=tmp_path / "folded", device="cpu").ok
    assert verify("acme/tiny", patch, device="cpu").ok
    fold_checkpoint("acme/tiny", made, tmp_path / "asked", revision="v1")
    with pytest.raises(PatchError, match="another model"):
        fold_checkpoint("acme/tiny", made, tmp_path / "latest")
    with pytest.raises(PatchError, match="another model"):
        fold_checkpoint("acme/tiny", patch, tmp_path / "latest", revision="main")
    revert_checkpoint(tmp_path / "folded", patch, tmp_path / "reverted")
