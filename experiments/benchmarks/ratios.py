"""The ratios R1 to R11: which arms, which target, which gate."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import torch

from experiments.benchmarks import arms, capturing
from experiments.benchmarks.bandwidth import graph_arms, row_arms
from experiments.benchmarks.folding import fold_times
from experiments.benchmarks.gates import step_gate
from experiments.benchmarks.protocol import (
    REPEATS,
    RESAMPLES,
    Ratio,
    compared,
    interleaved,
    memory_of,
    ratio_of,
)
from experiments.benchmarks.shapes import Shape, shape_for
from experiments.benchmarks.updating import optimizer_arms
from nest.generation.sampling import Sampling

Measure = Callable[[torch.device], list[Ratio]]

# Processes of each: what torch allocates does not vary, what a process holds does by a little.
MEMORY_SAMPLES = {"cpu": 3, "cuda": 1}


def r1(device: torch.device) -> list[Ratio]:
    """A tuning step on all layers against LoRA's."""
    shape, on_gpu = shape_for(device), device.type == "cuda"
    with ExitStack() as stack:
        made = {
            "nest": stack.enter_context(arms.nest_step(shape, device)),
            "nest shared": stack.enter_context(arms.nest_step(shape, device, form="shared")),
            "nest branch": stack.enter_context(arms.nest_step(shape, device, mode="branch")),
            "lora": stack.enter_context(arms.lora_step(shape, device)),
            "lora gated": stack.enter_context(arms.lora_step(shape, device, modules=arms.GATED)),
        }
        seconds = interleaved({name: arm.step for name, arm in made.items()}, device)
    gate = step_gate(str(device), shape.dtype)
    bound = "<= 0.88" if on_gpu else "<= 0.80"
    mlp, gated = "PEFT LoRA r16 on gate, up and down", "PEFT LoRA r16 on gate and up"
    return [
        compared("R1", f"tuning step / {mlp}", seconds, "nest", "lora", target=bound, gate=gate),
        compared("R1b", f"tuning step / {gated}", seconds, "nest", "lora gated",
                 target="<= 0.88", gate=gate),
        compared("R1c", f"tuning step, shared form / {mlp}", seconds, "nest shared", "lora",
                 target=bound, gate=gate),
        compared("R1d", f"tuning step, branch mode / {mlp}", seconds, "nest branch", "lora",
                 target=bound, gate=gate),
    ]  # fmt: skip


def r2(device: torch.device) -> list[Ratio]:
    """Upper layers alone, what is below them cached."""
    shape = shape_for(device)
    firsts = [0, shape.n_layers // 4, shape.n_layers // 2, 3 * shape.n_layers // 4]
    with ExitStack() as stack:
        made = {
            f"from {first}": stack.enter_context(
                arms.nest_step(shape, device, first_layer=first)
            ).step
            for first in firsts
        }
        made["lora"] = stack.enter_context(arms.lora_step(shape, device)).step
        seconds = interleaved(made, device)
    gate = step_gate(str(device), shape.dtype) and prefix_gate(shape, device)
    note = (
        "from the second epoch on; a dialogue's first pass fills the cache. LoRA is on all layers"
    )
    medians = [statistics.median(seconds[f"from {first}"]) for first in firsts]
    tuned = [shape.n_layers - first for first in firsts]
    linear, ci95 = linearity(tuned, [seconds[f"from {first}"] for first in firsts])
    name = "tuning step from layer {} of " + str(shape.n_layers) + ", prefix cached / LoRA r16 MLP"
    lines = [
        compared("R2", name.format(firsts[2]), seconds, f"from {firsts[2]}", "lora",
                 target="<= 0.60", gate=gate, note=note),
        compared("R2b", name.format(firsts[3]), seconds, f"from {firsts[3]}", "lora",
                 target="<= 0.34", gate=gate, note=note),
    ]  # fmt: skip
    by_layer = {f"{n} layers ms": 1e3 * m for n, m in zip(tuned, medians, strict=True)}
    return [
        *lines,
        Ratio("R2c", "time against layers tuned, squared correlation", linear, ci95,
              ">= 0.98", "pass" if gate else "fail", REPEATS, figures=by_layer),
    ]  # fmt: skip


def linearity(
    tuned: Sequence[int], seconds: Sequence[Sequence[float]]
) -> tuple[float, tuple[float, float]]:
    """Squared correlation of median times and numbers of layers, and its interval over rounds."""
    times = np.array(seconds)  # (numbers, rounds)
    draws = np.random.default_rng(0).integers(0, times.shape[1], (RESAMPLES, times.shape[1]))
    medians = np.median(times[:, draws], axis=2)  # (numbers, resamples)
    squares = [np.corrcoef(tuned, column)[0, 1] ** 2 for column in medians.T]
    low, high = np.percentile(squares, [2.5, 97.5])
    found = np.corrcoef(tuned, np.median(times, axis=1))[0, 1] ** 2
    return float(found), (float(low), float(high))


def r3(device: torch.device) -> list[Ratio]:
    """Time and memory against PEFT's SHiRA, the number of trained parameters nearly the same."""
    shape = shape_for(device)
    gate = step_gate(str(device), shape.dtype)
    large = like_shira(shape_for(device, memory=True))
    memory_line = _memory("R3m", "SHiRA", "shira", "<= 0.70", device, gate, n_clusters=large)
    with (
        arms.nest_step(shape, device, n_clusters=like_shira(shape)) as ours,
        arms.shira_step(shape, device) as theirs,
    ):
        seconds = interleaved({"nest": ours.step, "shira": theirs.step}, device)
        counts = f"{ours.trained:,} and {theirs.trained:,} trained parameters"
    time_line = compared(
        "R3", "tuning step / PEFT SHiRA on the MLP", seconds, "nest", "shira",
        target="<= 0.70", gate=gate, note=counts,
    )  # fmt: skip
    return [time_line, memory_line]


def r4(device: torch.device) -> list[Ratio]:
    """Time and memory against full fine-tuning."""
    shape, on_gpu = shape_for(device), device.type == "cuda"
    gate = step_gate(str(device), shape.dtype)
    # first, while this process holds no models beside
    memory_line = _memory("R4m", "full fine-tuning", "full", "<= 0.45", device, gate)
    with arms.nest_step(shape, device) as ours, arms.full_step(shape, device) as theirs:
        seconds = interleaved({"nest": ours.step, "full": theirs.step}, device)
    time_line = compared(
        "R4", "tuning step / full fine-tuning with fused AdamW", seconds, "nest", "full",
        target="<= 0.55" if on_gpu else "<= 0.60", gate=gate,
    )  # fmt: skip
    return [time_line, memory_line]


def r5(device: torch.device) -> list[Ratio]:
    """The optimizer step with its rows."""
    on_gpu = device.type == "cuda"
    with optimizer_arms(shape_for(device), device) as (made, gate):
        seconds = interleaved(made, device, inner=5)
    lines = [r5d(device), r5e(device)] if on_gpu else []
    return [
        compared("R5a", "optimizer step with rows / fused AdamW on the same rows apart", seconds,
                 "nest", "rows", target="<= 0.20" if on_gpu else "<= 0.50", gate=gate),
        compared("R5b", "optimizer step with rows / fused AdamW on one packed tensor", seconds,
                 "nest", "packed", target="<= 1.50", gate=gate),
        compared("R5c", "optimizer step with rows / masked AdamW on the dense weights", seconds,
                 "nest", "masked", target="<= 0.002" if on_gpu else "<= 0.05", gate=gate),
        *lines,
    ]  # fmt: skip


def r5d(device: torch.device, **size: int) -> Ratio:
    """Bytes a second that the step on many rows moves, against a copy's."""
    with row_arms(device, **size) as (moved, gate):
        seconds = interleaved({name: arm.step for name, arm in moved.items()}, device, inner=20)
    a_byte = {name: [s / moved[name].n_bytes for s in values] for name, values in seconds.items()}
    ratio, ci95 = ratio_of(a_byte["copy"], a_byte["nest"])
    n_bytes = moved["nest"].n_bytes
    return Ratio(
        "R5d", "optimizer step with rows, bytes a second / device copy", ratio, ci95, ">= 0.85",
        "pass" if gate else "fail", len(seconds["nest"]),
        note=f"{moved['copy'].n_bytes // 4:,} elements in bf16. Counted, {n_bytes:,} bytes: each W0 read "
        "and each W written once, parameters and moments read and written, gradients read; of the copy "
        "each byte read and written",
        figures={f"{name} GB/s": 1e-9 / statistics.median(values) for name, values in a_byte.items()},
    )  # fmt: skip


def r5e(device: torch.device) -> Ratio:
    """The step replayed from a CUDA graph."""
    with graph_arms(shape_for(device), device) as (made, gate):
        seconds = interleaved(made, device, inner=5)
    return compared(
        "R5e", "optimizer step replayed from a CUDA graph / launched", seconds, "replay", "eager",
        target="<= 1.00", gate=gate, note="the gate: both leave the same bits",
    )  # fmt: skip


def r6(device: torch.device) -> list[Ratio]:
    """Capture against a bare forward pass, and against nnsight."""
    shape, has_rival = shape_for(device), find_spec("nnsight") is not None
    gate = capturing.gate(shape, device, rival=has_rival)
    memory_line = _of_two(
        "R6m", "capture, peak memory / bare backbone", "capture", "bare", "<= 1.05", device, gate
    )
    with ExitStack() as stack:
        made = {
            "capture": stack.enter_context(capturing.ours(shape, device)).step,
            "bare": stack.enter_context(capturing.bare(shape, device)).step,
        }
        for name in ("nnsight", "nnsight pooled") if has_rival else ():
            arm = capturing.nnsight(shape, device, pooled=name == "nnsight pooled")
            made[name] = stack.enter_context(arm).step
        seconds = interleaved(made, device)
    lines = [
        compared("R6", "capture, tokens a second / bare backbone", seconds, "bare", "capture",
                 target=">= 0.97", gate=gate),
        memory_line,
    ]  # fmt: skip
    rivals = {
        "R6b": ("nnsight", "saving the same"),
        "R6c": ("nnsight pooled", "pooling in its trace"),
    }
    for id_, (arm_name, how) in rivals.items() if has_rival else ():
        name = f"capture, tokens a second / nnsight {how}"
        lines.append(compared(id_, name, seconds, arm_name, "capture", target=">= 1.50", gate=gate))
    return lines


def r7(device: torch.device) -> list[Ratio]:
    """Memory of tuning against LoRA's."""
    gate = step_gate(str(device), shape_for(device).dtype)
    return [_memory("R7", "PEFT LoRA r16 on the MLP", "lora", "<= 0.85", device, gate)]


def r8(device: torch.device) -> list[Ratio]:
    """Folding in memory."""
    seconds, gate = fold_times(shape_for(device), device)
    return [
        compared("R8", "fold in memory / PEFT merge_and_unload of LoRA r16 on the MLP", seconds,
                 "nest", "lora", target="<= 0.05", gate=gate,
                 note="the gate: logits after folding equal those of training to the last bit"),
    ]  # fmt: skip


def r9(device: torch.device) -> list[Ratio]:
    """Decoding for evaluation against one left-padded batch size."""
    from experiments.benchmarks.decoding import decoding_times

    seconds, gate, note = decoding_times(shape_for(device), device)
    return [
        compared("R9", "answers, tokens a second / left-padded generate", seconds, "generate",
                 "nest", target=">= 3", gate=gate, note=note),
    ]  # fmt: skip


def r10(device: torch.device) -> list[Ratio]:
    """The whole job to the same attack success."""
    from experiments.benchmarks.to_the_same_rate import LORA_RANK, TARGET, times

    seconds, gate, figures = times(device)
    line = compared(
        "R10",
        f"select, tune and fold / PEFT LoRA r{LORA_RANK}, to at most {100 * TARGET:.0f} % success",
        seconds, "nest", "lora", target="<= 0.60", gate=gate,
        note="one sample a seed; the gate: both get there, over-refusal and exact match unharmed",
    )  # fmt: skip
    return [replace(line, figures={**line.figures, **figures})]


def r11(device: torch.device) -> list[Ratio]:
    """Drawn and greedy answers against one left-padded batch size; requests in flight to a server."""
    from experiments.benchmarks import decoding, serving

    on_gpu = device.type == "cuda"
    target = ">= 3" if on_gpu else ">= 1.5"
    shape, new = shape_for(device), decoding.NEW_TOKENS
    load = decoding.Load.for_(device)
    kinds = {
        "R11": ("drawn answers", Sampling(temperature=1.0, max_new_tokens=new)),
        "R11b": ("drawn answers, top_p 0.9", Sampling(1.0, top_p=0.9, max_new_tokens=new)),
        "R11c": ("four drawn answers a prompt", Sampling(1.0, n=4, max_new_tokens=new)),
    }
    lines = []
    for id_, (what, sampling) in kinds.items():
        seconds, gate, note = decoding.sampling_times(shape, device, sampling, load)
        name = f"{what}, tokens a second / left-padded generate"
        lines.append(
            compared(id_, name, seconds, "generate", "nest", target=target, gate=gate, note=note)
        )
    if on_gpu:  # greedy ones are R9 there, and a server's answers take a CPU
        return lines
    seconds, gate, note = decoding.decoding_times(shape, device, load)
    name = "greedy answers, tokens a second / left-padded generate"
    lines.append(
        compared("R11d", name, seconds, "generate", "nest", target=target, gate=gate, note=note)
    )
    seconds, gate = serving.serving_times()
    note = (
        f"{serving.N_REQUESTS} requests to a stand-in server in this process that takes "
        f"{1e3 * serving.SERVICE_SECONDS:.0f} ms for each; the gate: all answers, in order"
    )
    name = f"answers of a server, {serving.IN_FLIGHT} requests in flight / one at a time"
    lines.append(
        compared("R11e", name, seconds, "one", "many", target=">= 12", gate=gate, note=note)
    )
    return lines


def prefix_gate(shape: Shape, device: torch.device) -> bool:
    """Whether the update's gradient from the cached prefix is the whole pass's, on this shape."""
    first = shape.n_layers // 2
    found = [
        arms.nest_gradient(shape, device, first_layer=first, cached=cached)
        for cached in (True, False)
    ]
    scale = float(found[1].abs().max())
    # the same operations on the same numbers; a margin for kernels that choose by shape
    return scale > 0 and float((found[0] - found[1]).abs().max()) <= 1e-3 * scale


def like_shira(shape: Shape) -> int:
    """As many clusters as bring our number of parameters to that of SHiRA at rank 1."""
    theirs = 3 * shape.n_layers * (shape.d_model + shape.d_ff)
    return max(1, round(theirs / (2 * shape.n_layers * shape.d_model)))


def _memory(
    id_: str,
    name: str,
    rival: str,
    target: str,
    device: torch.device,
    gate: bool,
    **settings: object,
) -> Ratio:
    name = f"tuning, peak memory / {name}"
    return _of_two(id_, name, "nest", rival, target, device, gate, **settings)


def _of_two(
    id_: str,
    name: str,
    ours: str,
    theirs: str,
    target: str,
    device: torch.device,
    gate: bool,
    **settings: object,
) -> Ratio:
    """Memory of each in processes of their own; `settings` are those of ours."""
    n = MEMORY_SAMPLES[device.type]
    found = [(memory_of(ours, device, **settings), memory_of(theirs, device)) for _ in range(n)]
    first, second = zip(*found, strict=True)
    ratio, ci95 = ratio_of(first, second)
    return Ratio(
        id_, name, ratio, ci95, target, "pass" if gate else "fail", n,
        note="peak of what torch allocated" if device.type == "cuda" else
        "peak resident memory of a process of its own, interpreter and libraries left out, on a model "
        "of 143 M parameters and a small batch: weights and state outweigh activations",
        figures={
            f"{label} MiB": statistics.median(values) / 2**20
            for label, values in (("ours", first), ("theirs", second))
        },
    )  # fmt: skip


CPU: Mapping[str, Measure] = {
    "R1": r1, "R2": r2, "R3": r3, "R4": r4, "R5": r5, "R6": r6, "R8": r8, "R10": r10, "R11": r11,
}  # fmt: skip
GPU: Mapping[str, Measure] = {**CPU, "R7": r7, "R9": r9}
