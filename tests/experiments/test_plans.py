"""The plans that come with us can be read and their arms made; README's tables are those of the results."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from experiments.compare import tables
from nest.comparison.plan import Plan
from nest.comparison.plan_file import read_plan

ROOT = Path(__file__).parents[2]
PLANS = sorted((ROOT / "experiments").rglob("*.toml"))


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_a_plan_can_be_read(file: Path) -> None:
    plan = read_plan(file)
    assert Plan(**plan.values()) == plan
    for name in plan.arms:
        assert plan.made(name, plan.seeds[0]).name == name
    assert file.stem == "quick" or len(plan.seeds) > 1


def test_the_readmes_plan(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [
        part.partition("```")[0] for part in text.split("```toml\n")[1:] if "[front]" in part
    ]
    assert tomllib.loads(block)["worlds"] == ["mine"]
    file = tmp_path / "plan.toml"
    file.write_text(block, encoding="utf-8")
    plan = read_plan(file)
    assert {"sweep", "front", "anytime", "robustness"} <= set(plan.values())
    assert plan.arm_of("mine").tuning == {"epochs": 5}


def test_the_readmes_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tables", "--check"])
    with pytest.raises(SystemExit) as ended:
        tables.main()
    assert ended.value.code == 0
