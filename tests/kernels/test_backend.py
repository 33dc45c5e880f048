"""Which implementation runs is the device's choice, the caller's or the environment's."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nest_kernels.backend import VARIABLE, check_runnable, use_triton


def test_cpu_tensors_take_the_reference_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not use_triton(torch.zeros(1))
    assert use_triton(torch.zeros(1), "triton")
    monkeypatch.setenv(VARIABLE, "triton")
    assert use_triton(torch.zeros(1))
    assert not use_triton(torch.zeros(1), "reference")
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match="'fast'; choose auto, reference or triton"):
        use_triton(torch.zeros(1))


def kernel(x):
    pass


def test_a_compiled_kernel_refuses_cpu_tensors() -> None:
    triton = pytest.importorskip("triton")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        check_runnable(triton.JITFunction(kernel), torch.zeros(1))


def test_triton_is_imported_only_where_it_runs() -> None:
    code = (
        "import sys, nest_kernels.neuron_adamw, nest_kernels.cluster_grad, nest_kernels.compile\n"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
