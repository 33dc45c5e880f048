"""The README's tree is the tree, and its order is the one that imports keep."""

from __future__ import annotations

import tomllib
from importlib.metadata import version

import pytest

from experiments.commands import COMMANDS
from experiments.commands import render as render_commands
from experiments.plan_keys import PLAN
from experiments.plan_keys import render as render_plan
from experiments.tree import END, README, ROOMS, ROOT, START, render


def test_the_readmes_tree_is_the_tree() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.split(START)[1].split(END)[0].strip("\n") == render(), "run `make docs`"


def test_every_room_is_in_it_and_in_the_contract_in_the_same_order() -> None:
    folders = {path.parent.name for path in (ROOT / "nest").glob("*/__init__.py")}
    assert folders == set(ROOMS)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    assert [layer for layer in layers if layer in ROOMS] == list(ROOMS)


def test_the_commands_are_those_of_the_command_line() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    if f"cyclopts=={version('cyclopts')}\n" not in pinned:
        pytest.skip("another cyclopts lays the document out otherwise")
    assert COMMANDS.read_text(encoding="utf-8") == render_commands(), "run `make docs`"


def test_the_plans_keys_are_those_of_its_settings() -> None:
    assert PLAN.read_text(encoding="utf-8") == render_plan(), "run `make docs`"
