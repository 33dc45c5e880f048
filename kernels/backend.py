"""Which implementation of an operation runs: the plain reference, or its Triton kernel."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Literal

from torch import Tensor

Backend = Literal["auto", "reference", "triton"]

VARIABLE = "NEST_KERNELS"
"""Environment variable that overrides the choice by device: `reference` or `triton`."""


def use_triton(tensor: Tensor, backend: Backend = "auto") -> bool:
    """Whether the Triton kernel is to run on this tensor.

    Args:
        tensor: What the operation works on; CUDA tensors take the kernel where Triton is installed.
        backend: `auto` asks the environment variable `NEST_KERNELS`, then the tensor's device.

    Raises:
        ValueError: an unknown name.
    """
    chosen = os.environ.get(VARIABLE, "auto") if backend == "auto" else backend
    if chosen not in ("auto", "reference", "triton"):
        raise ValueError(f"the kernels' backend is {chosen!r}; choose auto, reference or triton")
    if chosen != "auto":
        return chosen == "triton"
    return tensor.is_cuda and importlib.util.find_spec("triton") is not None


def check_runnable(kernel: Any, tensor: Tensor) -> None:
    """Refuse tensors that this kernel cannot reach.

    Raises:
        ValueError: CPU tensors and a compiled kernel.
    """
    from triton import JITFunction  # here: `import nest_kernels` is to work without triton

    if isinstance(kernel, JITFunction) and not tensor.is_cuda:
        raise ValueError(
            f"backend triton was asked for on {tensor.device} tensors; Triton runs on a GPU, or under its "
            "interpreter (set TRITON_INTERPRET=1 before triton is imported). Choose auto or reference"
        )
