"""Speed and memory of the main job: `python -m experiments.benchmarks.run`.

Prints a table and writes `results/main_job.json`. Wall times depend on the machine: run it on an idle one.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nest import api
from nest.artifacts.provenance import package_versions
from nest.models.chat import CallableEncoder, bucketed_batches, collate, encoder_for
from nest.models.layouts import find_sites
from nest.prompts.prompt_set import load_prompts
from nest.selection.capture import capture

RESULTS = Path(__file__).parent / "results"
REPEATS, WARM_UP = 30, 5


def main() -> None:
    """Measure everything, print it and write it down."""
    rows = [help_seconds(), demo_seconds_and_memory(), selection_seconds(), capture_ratio()]
    flat = [row for group in rows for row in group]
    for row in flat:
        print(f"{row['name']:48} {row['value']:10.3f} {row['unit']:6} target {row['target']}")
    RESULTS.mkdir(exist_ok=True)
    content = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": package_versions(),
        "commit": _commit(),
        "rows": flat,
    }
    (RESULTS / "main_job.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def help_seconds() -> list[dict[str, Any]]:
    """`nest --help`, median of several processes."""
    command = [str(Path(sys.executable).with_name("nest")), "--help"]
    seconds = [
        _timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
        for _ in range(11)
    ]
    return [_row("nest --help", statistics.median(seconds[1:]), "s", "< 0.5")]


def demo_seconds_and_memory() -> list[dict[str, Any]]:
    """`nest demo` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("nest")), "demo", "--out", f"{folder}/demo"]
        seconds = _timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
    return [
        _row("nest demo, wall time", seconds, "s", "<= 150"),
        _row("nest demo, peak memory", gib, "GiB", "<= 1.5"),
    ]


def selection_seconds() -> list[dict[str, Any]]:
    """Selection on the organism, model loaded already."""
    model, tokenizer = api.load(device="cpu")
    seconds = _timed(
        lambda: api.select(
            model, tokenizer, unsafe="organism:unsafe", safe="organism:safe", z_threshold=2.0
        )
    )
    return [_row("selection of the organism", seconds, "s", "< 20")]


def capture_ratio() -> list[dict[str, Any]]:
    """Capture against a bare forward pass of the backbone, same batches, interleaved."""
    model, tokenizer = api.load(device="cpu")
    encoder, sites = encoder_for(model, tokenizer), find_sites(model)
    prompts = list(load_prompts("organism:unsafe").prompts)
    encoded = [encoder.prompt(prompt) for prompt in prompts]
    batches = [
        collate([encoded[i] for i in indices], None, encoder.pad_id)
        for indices in bucketed_batches([len(ids) for ids in encoded], api.CAPTURE_BATCH_SIZE)
    ]

    by_prompt = dict(zip(prompts, encoded, strict=True))
    # Its tokens are made before the clock starts.
    ready = CallableEncoder(by_prompt.__getitem__, pad_id=encoder.pad_id)

    @torch.inference_mode()
    def bare() -> None:
        for batch in batches:
            model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)

    def captured() -> None:
        capture(model, ready, prompts, sites, batch_size=api.CAPTURE_BATCH_SIZE)

    pairs = [(_timed(bare), _timed(captured)) for _ in range(WARM_UP + REPEATS)][WARM_UP:]
    ratio = statistics.median(first / second for first, second in pairs)
    return [_row("capture speed / bare forward", ratio, "x", ">= 0.9")]


def _row(name: str, value: float, unit: str, target: str) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "target": target}


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
