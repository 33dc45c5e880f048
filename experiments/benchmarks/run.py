"""All ratios, or some: `python -m experiments.benchmarks.run [--device cuda] [--only R1,R8]`.

Prints a table and writes `results/cpu.json` or `results/gpu.json`. With `--only` the other lines of an
older file stay, each with the commit it was measured at; they must be of the same machine and versions. Run
it on an idle machine, and `python -m experiments.benchmarks.tables` afterwards.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from experiments.benchmarks import main_job, ratios
from experiments.benchmarks.protocol import Ratio
from nest.artifacts.provenance import package_versions

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
RIVALS = ("peft", "accelerate", "nnsight", "triton")
MAIN_JOB = "main"


def main() -> None:
    """Measure what is asked for, print it and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", help=f"such as R1,R8; {MAIN_JOB}: the commands' wall times")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    known = ratios.GPU if device.type == "cuda" else ratios.CPU
    every = [*known, *([MAIN_JOB] if device.type == "cpu" else [])]
    wanted = arguments.only.split(",") if arguments.only else every
    unknown = sorted(set(wanted) - set(every))
    if unknown:
        parser.error(
            f"no ratio {', '.join(unknown)} on {device.type}; there are {', '.join(every)}"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / ("gpu.json" if device.type == "cuda" else "cpu.json")
    if not arguments.only:
        path.unlink(missing_ok=True)
    elif path.exists() and not is_of(read(path), origin(device)):
        parser.error(
            f"{path} is of another machine or of other versions, and its lines cannot stand beside new "
            "ones; measure everything, or give another --out"
        )
    if MAIN_JOB in wanted:  # before the threads are cut to one: users have all of them
        keep(path, device, "main_job", [{**row, "id": row["name"]} for row in main_job.rows()])
    torch.set_num_threads(1)
    threadpool_limits(1)  # scikit-learn's and numpy's, in R10's selection
    for name in wanted:
        if name == MAIN_JOB:
            continue
        lines = known[name](device)
        for line in lines:
            print(line_of(line), flush=True)
        keep(path, device, "ratios", [line.to_json() for line in lines])
        del lines
        gc.collect()  # models of the last measure: the next one's processes need their memory
        if device.type == "cuda":
            torch.cuda.empty_cache()


def line_of(line: Ratio) -> str:
    """A ratio for the terminal."""
    low, high = line.ci95
    return (
        f"{line.id:5} {line.ratio:8.3f} [{low:.3f}, {high:.3f}]  target {line.target:8} "
        f"{line.verdict:8} {line.name}"
    )


def keep(path: Path, device: torch.device, section: str, lines: list[dict[str, Any]]) -> None:
    """Put lines into the result file, in place of older ones of the same id.

    What is from another machine or of other versions goes: a file is of one machine.
    """
    here, commit = origin(device), _commit()
    content = read(path) if path.exists() else {}
    if not is_of(content, here):
        content = {}
    fresh = {line["id"]: {**line, "commit": commit} for line in lines}
    older = {line["id"]: line for line in content.get(section, [])}
    content |= {
        **here,
        "commit": commit,
        "ratios": content.get("ratios", []),
        section: sorted({**older, **fresh}.values(), key=lambda line: _order(line["id"])),
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """A result file's content."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def origin(device: torch.device) -> dict[str, Any]:
    """Machine and versions, the rivals' too."""
    versions = package_versions()
    for package in RIVALS:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"machine": machine(device), "versions": versions}


def is_of(content: dict[str, Any], origin: dict[str, Any]) -> bool:
    """Whether a result file was measured there."""
    return all(content.get(key) == value for key, value in origin.items())


def machine(device: torch.device) -> dict[str, Any]:
    """What it ran on."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads of the ratios": 1,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _order(name: str) -> tuple[int, str]:
    digits = "".join(c for c in name[1:3] if c.isdigit())
    return (int(digits) if digits else 0, name)


def _processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
        )
        return done.stdout.strip()

    sources = ("nest", "kernels", "experiments/benchmarks/*.py")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


if __name__ == "__main__":
    main()
