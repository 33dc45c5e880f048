"""Compile every kernel for GPUs that need not be there, and print what each came to.

    python -m nest_kernels.compile --arch 90

For each kernel, data type and architecture: registers a thread, bytes spilled, accesses of 16 bytes,
and fused multiply-adds where they would change the bits of a model's rows. Exit status 1 where there
are any of these, or where registers are spilled. Needs Triton 3.3 or newer.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Variant:
    """One kernel as a launch specialises it.

    Attributes:
        name: What is printed.
        kernel: The jit function.
        types: Type of each argument that is neither fp32 nor a constant.
        constants: Values of the constants.
        num_warps: As launched.
        exact: Whether no multiplication may be fused with an addition.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    exact: bool


@dataclass(frozen=True)
class Compiled:
    """What a variant came to on one architecture.

    Attributes:
        n_registers: A thread's.
        spilled_bytes: A thread's stack and local memory.
        n_wide: Loads and stores of 16 bytes a thread.
        n_fused: Fused fp32 multiply-adds in the machine code; None where they may be.
    """

    n_registers: int
    spilled_bytes: int
    n_wide: int
    n_fused: int | None

    @property
    def passes(self) -> bool:
        return not self.spilled_bytes and not self.n_fused


def variants() -> Iterator[Variant]:
    """Every kernel in every data type."""
    for dtype in DTYPES:
        yield from _neuron_adamw_variants(dtype)
        yield from _cluster_grad_variants(dtype)


def _neuron_adamw_variants(dtype: str) -> Iterator[Variant]:
    from nest_kernels.neuron_adamw import plan
    from nest_kernels.neuron_adamw import triton as module

    types = dict.fromkeys(
        ["parameters", "gradient", "exp_avg", "exp_avg_sq", "step", "lr"], "*fp32"
    )
    types |= {"weights": f"*{dtype}", "originals": f"*{dtype}"}
    types |= {"slices": "*i64", "rows": "*i64", "counters": "*i32"}
    types |= dict.fromkeys(["n_slices", "n_blocks", "n_table_rows", "n_decayed"], "i32")
    # Strided rows alone are not written apart: that variant holds both copies of the tile.
    for adam, strided in ((True, False), (True, True), (False, True)):
        yield Variant(
            name=f"neuron_adamw {dtype} {'step' if adam else 'rows'}{' strided' * strided}",
            kernel=module.neuron_adamw_kernel,
            types=types,
            constants={
                "ADAM": adam,
                "ADVANCE": adam,
                "STRIDED": strided,
                "BLOCK": plan.BLOCK_D,
                "SLICE": plan.SLICE_ROWS,
            },
            num_warps=module.NUM_WARPS,
            exact=not adam,  # division and square root are made of fused multiply-adds
        )


def _cluster_grad_variants(dtype: str) -> Iterator[Variant]:
    from nest_kernels.cluster_grad import triton as module

    thin = "*bf16" if dtype == "bf16" else "*fp32"
    for loaded in (True, False):
        wide = "*fp32" if loaded else thin
        types = {"grad_output": f"*{dtype}", "summed": thin, "projected": wide, "partial": wide}
        types |= dict.fromkeys(["columns", "order", "starts"], "*i64")
        types["loadings"] = "*fp32" if loaded else "*i64"
        types |= dict.fromkeys(["n_tokens", "n_clusters", "n_columns"], "i32")
        types |= dict.fromkeys(["stride_token", "stride_column"], "i32")
        yield Variant(
            name=f"cluster_grad {dtype} {'loaded' if loaded else 'shared'}",
            kernel=module.segment_sum_kernel,
            types=types,
            constants={"LOADED": loaded, "TOKENS": module.BLOCK_T, "NEURONS": module.BLOCK_N},
            num_warps=module.NUM_WARPS,
            exact=False,
        )


def compiled(variant: Variant, architecture: int, *, fuse: bool = False) -> Compiled:
    """Compile for one architecture; no GPU is asked for.

    Args:
        variant: What to compile.
        architecture: Compute capability without the dot: 90 is sm_90.
        fuse: Let the compiler fuse multiplications with additions, as no launch of ours does.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in variant.constants else variant.types.get(name, "fp32")
        for name in variant.kernel.arg_names
    }
    # What launches get are allocations, at multiples of 16 bytes.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, type_name in enumerate(signature.values())
        if type_name.startswith("*")
    }
    found = triton.compile(
        ASTSource(variant.kernel, signature, variant.constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": variant.num_warps, "enable_fp_fusion": fuse},
    )
    usage = _resource_usage(found.asm["cubin"])
    return Compiled(
        n_registers=usage["REG"],
        spilled_bytes=usage["STACK"] + usage["LOCAL"],
        n_wide=len(re.findall(r"\b(?:ld|st)\.global\S*\.v4\.b32", found.asm["ptx"])),
        n_fused=found.asm["sass"].count("FFMA") if variant.exact else None,
    )


def _resource_usage(binary: bytes) -> dict[str, int]:
    """`REG`, `STACK`, `LOCAL` and more, as the tool that comes with triton tells them."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        told = subprocess.run(
            [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        )
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", told.stdout)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nest_kernels.compile",
        description="Compile every kernel; no GPU is needed.",
        epilog="example: python -m nest_kernels.compile --arch 90",
    )
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        default=list(ARCHITECTURES),
        help="compute capabilities without the dot (default: 80 90 100)",
    )
    chosen = parser.parse_args(arguments)
    # Read when triton is imported, which is below: what is asked for here is the compiler.
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    if [int(part) for part in triton.__version__.split(".")[:2]] < [3, 3]:
        parser.error(f"this is triton {triton.__version__}; expected 3.3 or newer")
    failed = False
    print(f"{'kernel':36} {'sm':>4} {'registers':>9} {'spilled':>8} {'wide':>5} {'fused':>6}")
    for variant in variants():
        for architecture in chosen.arch:
            found = compiled(variant, architecture)
            failed |= not found.passes
            fused = "-" if found.n_fused is None else found.n_fused
            print(
                f"{variant.name:36} {architecture:>4} {found.n_registers:>9} "
                f"{found.spilled_bytes:>8} {found.n_wide:>5} {fused:>6}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
