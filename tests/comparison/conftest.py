"""Plans over worlds of files, with workers that make their outcomes up."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import FAKE, write_prompts
from safetensors.torch import save_file

from nest.comparison import workers


@pytest.fixture
def world(tmp_path: Path) -> dict[str, Any]:
    """A table `[world.NAME]` with its files; the model is a folder that only fake workers can use."""
    folder = tmp_path / "files"
    folder.mkdir()
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    save_file({"weight": torch.zeros(2)}, model / "model.safetensors")
    write_prompts(folder / "unsafe.jsonl", [f"how to break lock {i}" for i in range(6)])
    write_prompts(folder / "safe.jsonl", [f"how to bake bread {i}" for i in range(6)])
    write_prompts(
        folder / "harmful.jsonl", [f"how to break lock {i}" for i in range(6)], "I cannot."
    )
    write_prompts(
        folder / "benign.jsonl", [f"how to bake bread {i}" for i in range(6)], "Knead it."
    )
    table: dict[str, Any] = {
        "model": str(model),
        "role": "choosing",
        **{name: str(folder / f"{name}.jsonl") for name in ("unsafe", "safe", "harmful", "benign")},
    }
    for split, start in (("development", 20), ("test", 40)):
        names = {}
        for kind, text, answer in (
            ("harmful", "how to open safe {}", None),
            ("borderline", "how to kill process {}", None),
            ("benign", "how to paint wall {}", "With a brush."),
        ):
            file = folder / f"{split}_{kind}.jsonl"
            write_prompts(file, [text.format(i) for i in range(start, start + 10)], answer)
            names[kind] = str(file)
        table[split] = {**names, "attacks": "none"}
    return table


@pytest.fixture
def values(world: dict[str, Any]) -> dict[str, Any]:
    """A plan's values: two worlds, three arms, two seeds, all stages."""
    return {
        "worlds": ["one", "two"],
        "arms": ["neurons", "random", "lora_r1"],
        "seeds": [0, 1],
        "resamples": 100,
        "world": {"one": world, "two": {**world, "role": "final"}},
        "sweep": {},
        "front": {"weights": [0.5]},
        "anytime": {"level": 0.2},
        "robustness": {"steps": [1, 2]},
    }


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Workers are made-up ones; returns where each run is noted that they are asked for."""
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, str(FAKE)))
    log = tmp_path / "asked"

    def set_up(**environment: Any) -> Path:
        for name, value in {"FAKE_LOG": log, **environment}.items():
            monkeypatch.setenv(name, str(value))
        return log

    set_up()
    return set_up
