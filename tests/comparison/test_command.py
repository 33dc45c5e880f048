"""`nest compare` as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nest.cli.main import _code_of

TOML = """
worlds = ["one"]
arms = ["neurons", "random"]
seeds = [0]
resamples = 100
[world.one]
model = {model}
role = "choosing"
unsafe = {unsafe}
safe = {safe}
harmful = {harmful}
benign = {benign}
[world.one.development]
harmful = {dev_harmful}
borderline = {dev_borderline}
benign = {dev_benign}
"""


@pytest.fixture
def plan(world: dict[str, Any], tmp_path: Path) -> Path:
    development = {f"dev_{name}": path for name, path in world["development"].items()}
    texts = {key: json.dumps(value) for key, value in {**world, **development}.items()}
    file = tmp_path / "plan.toml"
    file.write_text(TOML.format(**texts), encoding="utf-8")
    return file


def test_json(
    plan: Path, faked: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _code_of(["compare", "--config", str(plan), "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["out"], said["final"]) == (str(out), False)
    assert set(said["arms"][0]) == {
        *("arm", "world", "seed", "bare", "wrapped", "worst", "over_refusal", "exact_match", "kl"),
        *("parameters", "seconds", "peak_memory_bytes", "failed", "unimproved"),
    }
    (untreated,) = said["untreated"]
    assert untreated["world"] == "one" and untreated["wrapped"] > 0.5
    base, first, second = said["summaries"][:3]  # of the first pool; then world by world
    assert [one["arm"] for one in (base, first, second)] == ["", "neurons", "random"]
    assert base["figures"]["attack"] == pytest.approx(untreated["wrapped"])
    assert first["p"] is None and 0 < second["p"] <= 1
    low, high = second["intervals"]["attack"]
    assert low <= second["figures"]["attack"] <= high
    assert (second["n_failed"], second["n_unimproved"]) == (0, 0)


def test_the_table_and_where_it_is(
    plan: Path,
    faked: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _code_of(["compare", "--config", str(plan), "--quiet", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "untreated" in said and "random" in said and "wrote plan-comparison" in said
    assert (tmp_path / "plan-comparison" / "report.html").is_file()


def test_what_went_wrong_is_in_the_table(
    plan: Path,
    faked: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    faked(FAKE_FAILS="random", FAKE_UNIMPROVED="neurons")
    monkeypatch.setenv("COLUMNS", "120")
    out = ("--out", str(tmp_path / "out"))
    arguments = ["compare", "--config", str(plan), "--quiet", "--workers", "1", *out]
    assert _code_of(arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "neurons (no step improved in 1)" in said and "random (1 failed)" in said
    assert "Of all 3 runs 1 failed, and in 1 no step improved" in said
    monkeypatch.delenv("FAKE_FAILS")
    assert _code_of([*arguments, "--retry-failed"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "random (1 failed)" not in said and "Of all 3 runs 0 failed, and in 1" in said
    html = (tmp_path / "out" / "report.html").read_text()
    assert "nest compare --config plan.toml --out out --workers 1</td>" in html


@pytest.mark.parametrize(
    ("changed", "arguments", "said"),
    [
        (("random", "randm"), (), "there is no arm 'randm'; did you mean random?"),
        (('"one"]', '"two"]'), (), "there is no world 'two'"),
        (("seeds", 'judge = "oracle"\nseeds'), (), "oracle"),
        (("", ""), ("--workers", "0"), "--workers is '0'; it must be auto or a number from 1"),
        (("", ""), ("--final",), "[world.one] has no test split"),
        (("resamples = 100", "resamples = ["), (), "cannot be read as TOML"),
    ],
)
def test_one_sentence(
    plan: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: tuple[str, str],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    plan.write_text(plan.read_text().replace(*changed, 1))
    out = tmp_path / "out"
    assert _code_of(["compare", "--config", str(plan), "--out", str(out), *arguments]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and said in line
    assert not out.exists() and not (tmp_path / "out.unfinished").exists()
