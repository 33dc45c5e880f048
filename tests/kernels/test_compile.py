"""Every kernel compiles for GPUs that are not there: no spills, rows without fused operations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")
pytest.importorskip("triton", minversion="3.3")  # before, its compiler was called in another way

# Without the interpreter, which is on in this process where there is no GPU.
# Not the rows: nothing can be fused in them.
FUSED = """
from dataclasses import replace
from nest_kernels.compile import compiled, variants
variant = next(variant for variant in variants() if variant.name == "cluster_grad fp32 loaded")
for fuse in (False, True):
    print(compiled(replace(variant, exact=True), 90, fuse=fuse).n_fused)
"""


def python(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


def test_every_variant(tmp_path: Path) -> None:
    told = python(["-m", "nest_kernels.compile"], tmp_path)
    print(told.stdout)
    assert told.returncode == 0, told.stdout + told.stderr
    lines = [line.split() for line in told.stdout.splitlines()[1:]]
    assert len(lines) == 3 * 5 * 3  # data types, variants, architectures
    assert {line[-5] for line in lines} == {"80", "90", "100"}
    for line in lines:
        spilled, wide, fused = line[-3:]
        assert spilled == "0"
        assert (int(wide) > 0) == (line[0] == "neuron_adamw")
        assert fused == ("0" if "rows" in line else "-")


def test_fused_operations_would_be_seen(tmp_path: Path) -> None:
    told = python(["-c", FUSED], tmp_path)
    assert told.returncode == 0, told.stderr
    apart, fused = map(int, told.stdout.split())
    assert apart == 0 < fused
