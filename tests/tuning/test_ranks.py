"""Two processes train one update: FSDP in branch mode, DDP in live mode."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import build, choose, loss_of, tokens

from nest.tuning.update import trainable

SCRIPT = Path(__file__).with_name("rank.py")


@pytest.mark.slow  # half a minute of processes of their own
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_ranks_get_the_mean_of_their_gradients(kind: str, tmp_path: Path) -> None:
    meeting = tmp_path / "meeting"
    command = [sys.executable, "-W", "ignore", str(SCRIPT), kind]
    ranks = [
        subprocess.Popen([*command, str(rank), str(meeting)], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for rank in ranks:
        _, said = rank.communicate(timeout=300)
        assert rank.returncode == 0, said
    found = [torch.load(f"{meeting}-{kind}-{rank}.pt") for rank in (0, 1)]
    model = build()
    alone = []
    with trainable(model, choose(model)) as update:
        for seed in (0, 1):
            loss_of(model, tokens(seed=seed)).backward()
            alone.append(update.packed.grad.clone())
            update.packed.grad = None
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    # fp32 sums in another order
    torch.testing.assert_close(found[0][0], (alone[0] + alone[1]) / 2, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(alone[0], alone[1], rtol=0.1)
