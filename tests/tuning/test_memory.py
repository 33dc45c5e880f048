"""How much memory there is, in a container too."""

from pathlib import Path

import pytest
import torch

from nest.tuning import memory


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    whole = memory.free_bytes(torch.device("cpu"))
    assert whole is not None and whole > 2**20
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: ("memory.max", "memory.current"),
    }
    folder = tmp_path / "memory" if version == 1 else tmp_path
    folder.mkdir(exist_ok=True)
    for name, value in zip(names[version], (3 * 2**20, 2**20), strict=True):
        (folder / name).write_text(f"{value}\n")
    assert memory.free_bytes(torch.device("cpu")) == 2 * 2**20
    (folder / names[version][0]).write_text("max\n")
    assert memory.free_bytes(torch.device("cpu")) > 2 * 2**20
