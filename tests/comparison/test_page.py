"""Tables, figures and page: complete, the same again, and nothing of a user's text let through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from plans import merged

from nest.comparison.page import page
from nest.comparison.plan import Plan
from nest.comparison.run import run_comparison
from nest.comparison.tables import HEADINGS, summary_rows, tables

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
    assert "| neurons, loaded (the default) |" in tables(found)


def test_names_are_text(values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path) -> None:
    named = {"mine": {"method": "lora", "label": "<script>alert(1)</script> | $x$"}}
    small = merged(values, title="<b>T</b>", arms=["neurons", "mine"], arm=named, robustness=None)
    found = run_comparison(Plan(**small), tmp_path / "out", workers=1)
    html = page(found)
    assert "<script>" not in html and "<b>T</b>" not in html
    assert r"alert(1)</script> \| $x$ |" in tables(found)
