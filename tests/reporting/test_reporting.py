"""The report is one whole page, says the figures, escapes texts and asks nothing of the network."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from fakes import ATTACKS, fake_history, fake_report, fake_selection
from rich.console import Console

from nest.errors import OutputExistsError
from nest.reporting.html import RunFacts, render_report, write_report
from nest.reporting.plots import (
    attack_success_svg,
    cluster_map_svg,
    loss_svg,
    neurons_svg,
    principal_axes,
)
from nest.reporting.tables import eval_table, selection_table

FACTS = RunFacts("organism", "loaded", 4321, 0.0047, {"seeds": {"tune": 7}, "nest": "0.1.0"})
BEFORE = fake_report((0.5, 0.85, 0.9, 0.7, 0.1, 0.8))
AFTER = fake_report((0.02, 0.05, 0.1, 0.03, 0.0, 0.04), seed=1, kl=0.0123)


def page(**changes):
    given = {
        "facts": FACTS,
        "before": BEFORE,
        "selection": fake_selection(),
        "history": fake_history(),
    }
    return render_report(AFTER, **{**given, **changes})


class Checker(HTMLParser):
    """Collects tags, and every address a page would load from."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for key, value in attrs if key in ("src", "href", "xlink:href")]


def checked(html):
    checker = Checker()
    checker.feed(html)
    return checker


def test_page_loads_nothing_and_runs_nothing():
    checker = checked(page())
    assert "script" not in checker.tags
    assert "link" not in checker.tags
    assert all(address.startswith("#") for address in checker.loads)
    assert not re.search(r"url\((?!#)|@import", page())
    assert checker.tags.count("svg") == 4


def test_texts_of_models_and_files_are_escaped():
    html = page(facts=RunFacts("<i>m</i>", "shared", 1, 0.1, {"key": "<b>x</b>"}))
    assert "&lt;script&gt;alert(" in html
    assert "&lt;i&gt;m" in html
    assert "&lt;b&gt;x" in html
    assert {"i", "b", "script"}.isdisjoint(checked(html).tags)


def test_page_says_the_figures():
    html = page()
    text = re.sub(r"<svg.*?</svg>|<style.*?</style>", "", html, flags=re.S)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))
    for figure in (
        f"{100 * BEFORE.mean_attack_success:.1f} %",
        f"{100 * AFTER.mean_attack_success:.1f} %",
        f"{100 * AFTER.attack('story').rate:.1f} %",
        "4,321",
        "0.47 % of the model",
        "0.0123",
        "seeds.tune",
        "evaluation.judge_sha256",
        f"{fake_selection().n_neurons:,}",
        "paired bootstrap",
        "0.0 % *",  # base64 cannot be read, says its benign twin
    ):
        assert figure in text, figure


def test_parts_may_be_missing():
    assert checked(page(selection=None)).tags.count("svg") == 2
    assert checked(page(history=())).tags.count("svg") == 3
    assert checked(page(selection=fake_selection(profiles=False))).tags.count("svg") == 3
    alone = page(before=None)
    assert "→" not in alone.partition("<section>")[0]
    assert checked(alone).tags.count("svg") == 4


def test_page_is_the_same_at_every_run():
    assert page() == page()


def test_write_report(tmp_path):
    path = write_report(tmp_path / "out" / "report.html", page())
    assert path.read_text(encoding="utf-8") == page()
    with pytest.raises(OutputExistsError):
        write_report(path, "x")
    write_report(path, "x", overwrite=True)
    assert [child.name for child in path.parent.iterdir()] == ["report.html"]


def test_plots_are_well_formed_svg():
    many = fake_selection(layers=28)
    for svg in (
        attack_success_svg(BEFORE, AFTER),
        attack_success_svg(None, AFTER),
        neurons_svg(many),
        cluster_map_svg(many),
        loss_svg(fake_history()),
        loss_svg([{"step": 1, "train_loss": 1.0, "validation_loss": None}]),
    ):
        assert ET.fromstring(svg).tag.endswith("svg")
    assert loss_svg([]) is None


def test_principal_axes_find_two_groups_and_keep_distances():
    generator = np.random.default_rng(0)
    centre = generator.normal(size=(2, 50))
    profiles = np.repeat(centre, 10, axis=0) + 0.05 * generator.normal(size=(20, 50))
    points = principal_axes(profiles)
    assert (points[:10, 0] > 0).all() != (points[10:, 0] > 0).all()
    spread = profiles - profiles.mean(1, keepdims=True)
    spread /= profiles.std(1, keepdims=True)
    centred = spread - spread.mean(0)
    # two axes carry at most, and here nearly, all of the variance
    assert 0.9 < (points**2).sum() / (centred**2).sum() <= 1 + 1e-9


@pytest.mark.parametrize("shape", [(1, 8), (2, 1), (3, 2)])
def test_principal_axes_of_few_neurons(shape):
    points = principal_axes(np.ones(shape))
    assert points.shape == (shape[0], 2)
    assert np.isfinite(points).all()


def printed(table):
    console = Console(width=140, file=None, record=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_tables_have_a_row_an_attack_and_a_row_a_site():
    text = printed(eval_table(AFTER, BEFORE))
    assert all(name in text for name in ATTACKS[1:])
    assert f"{100 * BEFORE.mean_attack_success:.1f} %" in text
    assert "over-refusal" in text
    assert "before" not in printed(eval_table(AFTER))
    selection = fake_selection()
    rows = printed(selection_table(selection))
    assert rows.count("gate_proj") == 4
    assert f"{selection.n_neurons:,}" in rows
    # the share is of all that were looked at, where that is known
    known = replace(selection, provenance={"neurons_looked_at": 98_765})
    assert "98,765" in printed(selection_table(known)) and "98,765" not in rows
    odd = replace(selection, provenance={"neurons_looked_at": "many"})
    assert printed(selection_table(odd)) == rows


def test_dollars_in_names_are_no_formulas():
    name = "$x^{$ [/INST]"
    renamed = replace(
        AFTER,
        attacks=tuple(name if attack == "story" else attack for attack in AFTER.attacks),
        responses=tuple(
            replace(one, attack=name) if one.attack == "story" else one for one in AFTER.responses
        ),
    )
    assert attack_success_svg(None, renamed)
