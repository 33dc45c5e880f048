"""Damaged artifacts: none crashes the reader, and none goes into a model and cannot be taken out again.

NEST_MUTATIONS=2000 python -m pytest tests/patches/test_mutations.py
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
N = int(os.environ.get("NEST_MUTATIONS", "200"))


# --- damage ---------------------------------------------------------------------------------------


def _flipped(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _cut(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data))]


def _grown(data: bytearray, rng: random.Random) -> bytearray:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.randint(1, 40)) + data[place:]


def _blanked(data: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.randint(1, 64))
    return data[:start] + bytes(stop - start) + data[stop:]


def _swapped(data: bytearray, rng: random.Random) -> bytearray:
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    n = min(16, b - a, len(data) - b)
    data[a : a + n], data[b : b + n] = data[b : b + n], data[a : a + n]
    return data


BYTES: tuple[Callable[[bytearray, random.Random], bytearray], ...] = (
    *(_flipped, _flipped, _cut, _grown, _blanked, _swapped),
)
VALUES = ("gone", None, "x", -1, 0, 1, 7, 2**64, 1e300, [], {}, [0, 1], True, "0" * 64)


def _edited(data: bytearray, rng: random.Random) -> bytearray:
    """A manifest with one of its values replaced."""
    content = json.loads(data)
    parent: Any = content
    while True:
        key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        child = parent[key]
        if not isinstance(child, (dict, list)) or not child or rng.random() < 0.2:
            break
        parent = child
    value = rng.choice(VALUES)
    if value == "gone":
        del parent[key]
    else:
        parent[key] = value
    return bytearray(json.dumps(content).encode())


def damage(folder: Path, rng: random.Random) -> None:
    """Change one file of an artifact in one of many ways."""
    file = rng.choice(sorted(path for path in folder.iterdir() if path.name != "README.md"))
    data = bytearray(file.read_bytes())
    if file.suffix == ".json" and rng.random() < 0.6:
        file.write_bytes(_edited(data, rng))
    elif rng.random() < 0.03:
        file.unlink()
    else:
        file.write_bytes(rng.choice(BYTES)(data, rng))


# --- what becomes of it ---------------------------------------------------------------------------


def run(work: Path, n: int) -> None:
    """In a process of its own: jaxtyping's hook would catch what users would see."""
    from tiny_models import same_bits, state_of
    from tiny_patches import build, make_patch, select

    from nest.errors import NestError
    from nest.patches.checkpoint import fold_checkpoint, revert_checkpoint
    from nest.patches.patch import NeuronPatch
    from nest.selection.selection import NeuronSelection

    model = build()
    checkpoint = work / "checkpoint"
    model.save_pretrained(checkpoint)
    make_patch(model).save(work / "patch")
    select(model).save(work / "selection")
    before = state_of(model)
    seen: Counter[str] = Counter()
    for seed in range(n):
        rng = random.Random(seed)
        kind = rng.choice(("patch", "patch", "selection"))
        folder = work / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(work / kind, folder)
        damage(folder, rng)
        try:
            if kind == "selection":
                NeuronSelection.load(folder)
                seen["selection read"] += 1
                continue
            patch = NeuronPatch.load(folder)
            patch.fold_into(model)
        except NestError as fault:
            assert len(str(fault)) > 20, (seed, fault)
            assert same_bits(before, state_of(model)), seed
            seen[f"{kind} refused"] += 1
            continue
        patch.revert(model)
        assert same_bits(before, state_of(model)), seed
        fold_checkpoint(checkpoint, patch, work / "folded", overwrite=True)
        revert_checkpoint(work / "folded", patch, work / "reverted", overwrite=True)
        for file in checkpoint.glob("*.safetensors"):
            assert (work / "reverted" / file.name).read_bytes() == file.read_bytes(), seed
        seen["patch in and out"] += 1
    print(dict(seen))


def test_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    paths = [str(TESTS), str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(N)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["manifest.json", "patch.safetensors"])
def test_the_damage_is_done(tmp_path: Path, name: str) -> None:
    """Each seed changes the file, or nothing was tested."""
    changed = 0
    for seed in range(50):
        (tmp_path / name).write_bytes(b'{"a": [1, {"b": "text"}], "c": 2}')
        before = (tmp_path / name).read_bytes()
        damage(tmp_path, random.Random(seed))
        file = tmp_path / name
        changed += not file.exists() or file.read_bytes() != before
    assert changed >= 45


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
