"""Tables, figures and page: complete, the same again, and nothing of a user's text let through."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from plans import merged

from nest.comparison.arms import ARMS
from nest.comparison.figures import COLOURS, MARKS, _line_of
from nest.comparison.page import page
from nest.comparison.plan import Plan
from nest.comparison.run import run_comparison
from nest.comparison.tables import HEADINGS, summary_rows, tables
from nest.comparison.task import key_of

SECTIONS = (
    "Worlds that no setting was chosen on",
    "World by world",
    "Fronts",
    "What it cost",
    "How soon",
    "What undoes it",
)


def test_every_stage_has_its_section(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    found = run_comparison(Plan(**values), tmp_path / "out", workers=2)
    html, text = page(found), tables(found)
    assert all(f"<h2>{section}</h2>" in html for section in SECTIONS)
    assert html.count("<svg") == 6
    assert "Measured on development splits" in html and "development splits" in text
    for heading in ("## one", "## two", "## Weights on benign answers", "## What undoes it"):
        assert heading in text
    assert all(len(row) == len(HEADINGS) for row in summary_rows(found, ("one", "two")))
    assert page(found) == html and tables(found) == text


def test_only_what_was_asked_for(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    left_out = dict.fromkeys(("sweep", "front", "anytime", "robustness"))
    small = merged(values, worlds=["one"], arms=["neurons"], seeds=[0], **left_out)
    found = run_comparison(Plan(**small), tmp_path / "out", workers=1)
    html = page(found)
    assert html.count("<svg") == 2  # attack success, and what it cost
    assert all(f"<h2>{section}</h2>" not in html for section in SECTIONS[1:3])
    assert "| neurons (the default) |" in tables(found)


def test_names_are_text(values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path) -> None:
    named = {"mine": {"method": "lora", "label": "<script>alert(1)</script> | $x$"}}
    small = merged(values, title="<b>T</b>", arms=["neurons", "mine"], arm=named, robustness=None)
    found = run_comparison(Plan(**small), tmp_path / "out", workers=1)
    html = page(found)
    assert "<script>" not in html and "<b>T</b>" not in html
    assert r"alert(1)</script> \| $x$ |" in tables(found)


def test_how_to_reproduce(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    small = merged(values, robustness=None, anytime=None, front=None)
    plan = Plan(**small)
    found = run_comparison(
        plan, tmp_path / "out", workers=1, command="nest compare --config p.toml"
    )
    html = (tmp_path / "out" / "report.html").read_text().split("How to reproduce")[1]
    assert "nest compare --config p.toml" in html
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", html)
    assert key_of(json.loads((tmp_path / "out" / "results.json").read_text())["plan"]) in html
    for name, facts in found.worlds.items():
        assert f"model of {name}" in html and facts.identity["model"]["files"] in html
    for package in ("torch", "peft", "statsmodels"):
        assert f">{package}</td>" in html and version(package) in html


def test_all_arms_are_told_apart(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    """By colour and mark where there is no line, and by colour and line where there is one."""
    arms = [name for name in ARMS if name != "plain"]
    left_out = dict.fromkeys(("sweep", "front", "anytime", "robustness"))
    small = merged(values, arms=arms, seeds=[0], worlds=["one"], **left_out)
    found = run_comparison(Plan(**small), tmp_path / "out", workers=1)
    looks = [_line_of(found, arm) for arm in arms]
    assert len({(one["color"], one["marker"]) for one in looks}) == len(arms)
    assert len({(one["color"], one["linestyle"]) for one in looks}) == len(arms)
    assert len({(i % len(COLOURS), i % len(MARKS)) for i in range(130)}) == 130
