"""Checkpoints of two families go through the command line and come back bit for bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import LAYERS, UNSAFE, encoder_of, same_bits, save_checkpoint, write_data

from nest.cli.main import run
from nest.models.loading import load_weights
from nest.patches.patch import NeuronPatch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "n_sites"), [("qwen3", 2 * LAYERS), ("gpt_neox", LAYERS)])
def test_select_tune_fold_verify_revert(
    family: str,
    n_sites: int,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def nest(command: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["nest", *command.split(), "--json"])
        with pytest.raises(SystemExit) as stopped:
            run()
        out, err = capsys.readouterr()
        assert not stopped.value.code, err
        values: dict[str, Any] = json.loads(out)
        return values

    monkeypatch.chdir(tmp_path)
    base = save_checkpoint(tmp_path / "base", family, dtype=dtype)
    write_data(tmp_path)
    selected = nest("select --model ./base --unsafe unsafe.jsonl --safe safe.jsonl --z 1 --out s")
    assert selected["sites"] == n_sites and selected["neurons"] > n_sites
    tuned = nest(
        "tune --model ./base --clusters s --harmful harmful.jsonl --benign benign.jsonl --out p "
        "--max-steps 8 --validate-every 2 --learning-rate 0.1"
    )
    patch = NeuronPatch.load(tmp_path / "p")
    assert tuned["trainable_parameters"] == patch.trainable_parameters
    folded = nest("fold --model ./base --patch p --out folded")
    assert folded["rows_changed"] == selected["neurons"]
    verified = nest("verify --model ./base --patch p --folded folded")
    assert verified["ok"] and verified["rows_changed"] <= selected["neurons"]
    nest("revert --model ./folded --patch p --out back")

    tensors = load_file(base / "model.safetensors")
    assert same_bits(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    assert not same_bits(load_file(tmp_path / "folded" / "model.safetensors"), tensors)
    for file in (path for path in base.iterdir() if path.is_file()):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()

    live = load_weights(base, device="cpu")
    encoder, written = encoder_of(live), load_weights(tmp_path / "folded", device="cpu")
    with torch.no_grad():
        before = [live(torch.tensor([encoder.prompt(prompt)])).logits for prompt in UNSAFE]
        patch.fold_into(live)
        for prompt, untuned in zip(UNSAFE, before, strict=True):
            ids = torch.tensor([encoder.prompt(prompt)])
            assert torch.equal(written(ids).logits, live(ids).logits)
            assert not torch.equal(untuned, live(ids).logits)
