"""The README's tree is the tree, and its order is the one that imports keep."""

from __future__ import annotations

import tomllib

from experiments.tree import END, README, ROOMS, ROOT, START, render


def test_the_readmes_tree_is_the_tree() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.split(START)[1].split(END)[0].strip("\n") == render(), "run `make tree`"


def test_every_room_is_in_it_and_in_the_contract_in_the_same_order() -> None:
    folders = {path.parent.name for path in (ROOT / "nest").glob("*/__init__.py")}
    assert folders == set(ROOMS)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    assert [layer for layer in layers if layer in ROOMS] == list(ROOMS)
