"""The stages, what is kept of them, and what becomes of them when something goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plans import FAKE, asked, merged, write_prompts

from nest.artifacts.storage import seal_of
from nest.comparison.plan import Plan
from nest.comparison.run import devices_for, n_runs, run_comparison
from nest.errors import EngineError, InputError, OutputExistsError

WRITTEN = ("results.json", "tables.md", "report.html", "costs.json", "journal.jsonl")
DETERMINED = ("results.json", "tables.md")


def bytes_of(out: Path, names: tuple[str, ...] = DETERMINED) -> list[bytes]:
    return [(out / name).read_bytes() for name in names]


def test_all_stages(values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path) -> None:
    log, plan = faked(), Plan(**values)
    told: list[tuple[str, int, int]] = []
    found = run_comparison(
        plan, tmp_path / "out", workers=2, progress=lambda *step: told.append(step)
    )
    # 2 bases, 3 arms x 4 tried x 1 world, 2 x 3 x 2 reported, 2 x 3 front, 3 anytime, 3 robustness
    assert len(asked(log)) == len(found.runs) == n_runs(plan) == 2 + 12 + 12 + 6 + 3 + 3
    assert told[-1] == ("compare", n_runs(plan), n_runs(plan))
    assert all((tmp_path / "out" / name).is_file() for name in WRITTEN)
    assert not (tmp_path / "out.unfinished").exists()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["measured_on"] == "development"
    for arm, choice in results["choices"].items():
        scores = {one["value"]: one["score"] for one in choice["tried"]}
        assert len(scores) == 4 and scores[choice["value"]] == min(scores.values())
        knobs = {r["task"]["knob"] for r in results["runs"] if r["task"]["arm"] == arm}
        assert knobs == set(scores)  # the sweep's, of which all others have one
    rows = found.rows()
    assert [(row["world"], row["arm"], row["seed"]) for row in rows] == [
        (world, arm, seed) for world in plan.worlds for arm in plan.arms for seed in plan.seeds
    ]
    assert {"bare", "wrapped", "worst", "kl", "seconds", "parameters"} <= set(rows[0])


def test_a_summary_is_the_mean_of_its_runs(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    found = run_comparison(Plan(**values), tmp_path / "out", workers=1)
    strict = found.by_other_judges()
    for one in found.summaries[1:]:
        own = [r for r in found.rows() if r["arm"] == one.arm and r["world"] in one.worlds]
        assert one.figures["attack"] == pytest.approx(sum(r["wrapped"] for r in own) / len(own))
        assert one.figures["kl"] == pytest.approx(sum(r["kl"] for r in own) / len(own))
        every = [row for row in found.rows() if row["arm"] == one.arm]
        expected = sum(row["bare"] / 2 for row in every) / len(every)
        assert strict[one.arm] == {"strict": pytest.approx(expected)}
        low, high = one.intervals["attack"]
        assert low <= one.figures["attack"] <= high
        assert (one.p is None) == (one.arm == "neurons")


def test_at_equal_seconds(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    found = run_comparison(Plan(**merged(values, robustness=None)), tmp_path / "out", workers=1)
    equal = found.at_equal_seconds()
    assert list(equal) == ["one"] and equal["one"]["seconds"] == 9.5
    assert equal["one"]["arms"]["random"] == {"attack": 1 / 20, "over_refusal": 0.0}
    rows = found.anytime()
    assert {row["steps_to_level"] for row in rows} == {4}  # 1 / (4 + 1) is the level of 0.2
    assert {row["seconds_to_level"] for row in rows} == {2.0}


def test_nothing_is_run_again_and_more_may_come(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    """A finished comparison grows by arms, worlds, seeds and stages; the rest is taken as it is."""
    small = merged(values, worlds=["one"], arms=["neurons"], seeds=[0], front=None, anytime=None)
    log = faked()
    run_comparison(Plan(**small), tmp_path / "out", workers=1)
    before = asked(log)
    run_comparison(Plan(**small), tmp_path / "out", workers=1)
    assert asked(log) == before
    run_comparison(Plan(**values), tmp_path / "out", workers=2)
    everything = asked(log)
    assert len(everything) == len(set(everything)) == n_runs(Plan(**values))
    other = run_comparison(Plan(**values), tmp_path / "other", workers=1)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "other")
    assert len(other.runs) == n_runs(Plan(**values))


COMPARE = """
import json, sys
from pathlib import Path
from nest.comparison import workers
from nest.comparison.plan import Plan
from nest.comparison.run import run_comparison
workers.COMMAND = (sys.executable, sys.argv[1])
run_comparison(Plan(**json.loads(Path(sys.argv[2]).read_text())), sys.argv[3], workers=2)
"""


def test_killed_five_times(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    """Killed with -9 wherever it is, it goes on and ends with the same bytes; no run is lost."""
    run_comparison(Plan(**values), tmp_path / "whole", workers=2)
    (tmp_path / "plan.json").write_text(json.dumps(values))
    log = tmp_path / "again"
    environment = {**os.environ, "FAKE_LOG": str(log), "FAKE_SLEEP": "0.05"}
    arguments = [str(FAKE), str(tmp_path / "plan.json"), str(tmp_path / "killed")]
    total, kills, journal = n_runs(Plan(**values)), 0, tmp_path / "killed.unfinished/journal.jsonl"
    for kept in (1, 8, 16, 24, 33):
        process = subprocess.Popen([sys.executable, "-c", COMPARE, *arguments], env=environment)
        while process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") >= kept:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        process.wait()
        assert not (tmp_path / "killed").exists()
    assert kills == 5
    subprocess.run([sys.executable, "-c", COMPARE, *arguments], env=environment, check=True)
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")
    # what was under way when it was killed was asked for again, at most two a kill
    assert total <= len(asked(log)) <= total + 2 * kills


def test_a_worker_that_dies_once(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    run_comparison(Plan(**values), tmp_path / "whole", workers=2)
    faked(FAKE_DIES="random", FAKE_TIMES=tmp_path)
    (tmp_path / "death1").touch()
    run_comparison(Plan(**values), tmp_path / "out", workers=2)
    assert not (tmp_path / "death1").exists()
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_worker_that_dies_again(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    """The other runs of the stage are done and kept, and then it says what was fatal."""
    log = faked(FAKE_DIES="random", FAKE_TIMES=tmp_path)
    for number in range(2):
        (tmp_path / f"death{number}").touch()
    with pytest.raises(
        EngineError, match=r"died twice over 1 of the runs: sweep, one, random.*kept"
    ):
        run_comparison(Plan(**values), tmp_path / "out", workers=1)
    assert len(asked(log)) == 2 + 12 + 1
    run_comparison(Plan(**values), tmp_path / "out", workers=1)
    assert len(asked(log)) == n_runs(Plan(**values)) + 2


def test_an_arm_that_fails_is_a_row(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    faked(FAKE_FAILS="random")
    said: list[str] = []
    found = run_comparison(Plan(**values), tmp_path / "out", workers=2, warn=said.append)
    rows = [row for row in found.rows() if row["arm"] == "random"]
    assert {row["failed"] for row in rows} == {"SelectionError: no neuron passes the threshold"}
    assert any("no neuron passes" in text for text in said)
    base, own = found.summaries[0], next(one for one in found.summaries if one.arm == "random")
    assert own.n_failed == 2 and own.figures["attack"] == base.figures["attack"]
    assert "no neuron passes the threshold" in (tmp_path / "out" / "tables.md").read_text()


def test_another_arm_of_the_same_name(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    ours = {"mine": {"method": "lora", "rank": 1}}
    run_comparison(Plan(**merged(values, arms=["mine"], arm=ours)), tmp_path / "out", workers=1)
    ours = {"mine": {"method": "lora", "rank": 2}}
    with pytest.raises(InputError, match=r"the arm mine was another one .*rank was 1 and is 2"):
        run_comparison(Plan(**merged(values, arms=["mine"], arm=ours)), tmp_path / "out", workers=1)
    run_comparison(
        Plan(**merged(values, arms=["mine"], arm=ours)), tmp_path / "out", workers=1, restart=True
    )
    changed = merged(values, arms=["mine"], arm=ours, evaluation={"max_new_tokens": 7})
    with pytest.raises(InputError, match=r"another judge, \[evaluation\] or number of threads"):
        run_comparison(Plan(**changed), tmp_path / "out", workers=1)


def test_what_is_left_out_is_kept(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    """Of an arm that a later plan leaves out nothing is lost, and a default that is named is no other."""
    log = faked()
    run_comparison(Plan(**values), tmp_path / "out", workers=1)
    before = asked(log)
    fewer = merged(values, arms=["neurons"], evaluation={"max_new_tokens": 40})
    run_comparison(Plan(**fewer), tmp_path / "out", workers=1)
    run_comparison(Plan(**values), tmp_path / "out", workers=1)
    assert asked(log) == before


def test_worlds_that_settings_were_chosen_on_are_apart(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    found = run_comparison(Plan(**values), tmp_path / "out", workers=1)
    assert list(found.pools.values()) == [("two",), ("one",)]
    assert {one.worlds for one in found.summaries} == {("two",)}
    text = (tmp_path / "out" / "tables.md").read_text()
    assert text.index("no setting was chosen on") < text.index("settings were chosen on")


def test_another_world_of_the_same_name(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    run_comparison(Plan(**values), tmp_path / "out", workers=1)
    write_prompts(Path(values["world"]["one"]["unsafe"]), ["how to break window 1"])
    with pytest.raises(InputError, match=r"the world one was another one .*training.unsafe was"):
        run_comparison(Plan(**values), tmp_path / "out", workers=1)


def test_a_final_run_looks_at_the_test_split(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    """Without --final the test split's files are not even opened."""
    Path(values["world"]["one"]["test"]["harmful"]).rename(tmp_path / "away")
    run_comparison(Plan(**values), tmp_path / "out", workers=1)
    with pytest.raises(InputError, match="holds a comparison on development splits"):
        run_comparison(Plan(**values), tmp_path / "out", final=True, workers=1)
    (tmp_path / "away").rename(values["world"]["one"]["test"]["harmful"])
    found = run_comparison(Plan(**values), tmp_path / "final", final=True, workers=1)
    results = json.loads((tmp_path / "final" / "results.json").read_text())
    assert results["measured_on"] == "test"
    by_stage = {run.task.stage: run.task.split for run in found.runs}
    assert by_stage == {
        **dict.fromkeys(("base", "main", "front"), "test"),
        **dict.fromkeys(("sweep", "anytime", "robustness"), "development"),
    }
    without = {**values["world"]["one"]}
    del without["test"]
    with pytest.raises(InputError, match=r"\[world.one\] has no test split"):
        changed = merged(values, world={**values["world"], "one": without})
        run_comparison(Plan(**changed), tmp_path / "third", final=True, workers=1)


def test_the_same_prompt_on_both_sides(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    both = [f"how to break lock {i}" for i in range(3)]
    write_prompts(Path(values["world"]["one"]["benign"]), [*both, "how to bake"], "Gladly.")
    log = faked()
    with pytest.raises(
        InputError, match=r"in the world one 3 prompts are both training harmful .* and training"
    ):
        run_comparison(Plan(**values), tmp_path / "out", workers=1)
    assert asked(log) == [] and not (tmp_path / "out.unfinished").exists()


def test_a_world_that_complies_with_nothing(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    faked(FAKE_BASE="nothing")
    with pytest.raises(InputError, match="world one complies with no harmful prompt at all"):
        run_comparison(Plan(**values), tmp_path / "out", workers=1)


def test_a_world_that_cannot_be_used(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    faked(FAKE_FAULT="the checkpoint lacks weights; save it whole")
    with pytest.raises(InputError, match="lacks weights"):
        run_comparison(Plan(**values), tmp_path / "out", workers=2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"judge": "oracle"}, "oracle"),
        ({"arms": ["mine"], "arm": {"mine": {"method": "lora", "size": 1}}}, "no setting 'size'"),
        ({"arms": ["mine"], "arm": {"mine": {"method": "lora", "rank": 0}}}, "rank is 0"),
    ],
)
def test_before_any_work(
    values: dict[str, Any], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        run_comparison(Plan(**merged(values, **changes)), tmp_path / "out")
    assert not (tmp_path / "out.unfinished").exists()


def test_two_runs_in_one_folder(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    faked(FAKE_SLEEP=1)
    (tmp_path / "plan.json").write_text(json.dumps(values))
    arguments = [str(FAKE), str(tmp_path / "plan.json"), str(tmp_path / "out")]
    first = subprocess.Popen([sys.executable, "-c", COMPARE, *arguments])
    try:
        while not (tmp_path / "out.unfinished" / "journal.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.01)
        with pytest.raises(InputError, match="another nest is at work on out"):
            run_comparison(Plan(**values), tmp_path / "out", workers=1)
    finally:
        first.kill()
        first.wait()


def test_somebodys_own_folder(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExistsError, match="not overwritten"):
        run_comparison(Plan(**values), out, workers=1)
    assert (out / "thesis.tex").read_text() == "years of work"


def test_a_damaged_journal(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    run_comparison(Plan(**values), tmp_path / "out", workers=1)
    manifest = tmp_path / "out" / "manifest.json"  # of before there were seals
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": "1.0"}))
    journal = tmp_path / "out" / "journal.jsonl"
    journal.write_text('{"key": 3}\n' + journal.read_text())
    with pytest.raises(InputError, match="not of nest"):
        run_comparison(Plan(**values), tmp_path / "out", workers=1)
    journal.write_text("{" + journal.read_text())
    with pytest.raises(InputError, match="line 1 is damaged"):
        run_comparison(Plan(**values), tmp_path / "out", workers=1)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert devices_for("cpu", "auto", 2) == ["cpu"] * 3
    assert devices_for("cpu", 4, 2) == ["cpu"] * 4
    with pytest.raises(InputError, match="unknown device"):
        devices_for("gpu9", "auto", 1)


def test_nothing_is_thrown_away_before_it_is_checked(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    """--restart with a plan that cannot be run leaves what an interrupted call has done."""
    faked(FAKE_DIES="random", FAKE_TIMES=tmp_path)
    for number in range(2):
        (tmp_path / f"death{number}").touch()
    with pytest.raises(EngineError, match="died twice"):
        run_comparison(Plan(**values), tmp_path / "out", workers=1)
    journal = tmp_path / "out.unfinished" / "journal.jsonl"
    before = journal.read_bytes()
    Path(values["world"]["one"]["safe"]).unlink()
    with pytest.raises(InputError):
        run_comparison(Plan(**values), tmp_path / "out", workers=1, restart=True)
    assert before and journal.read_bytes() == before


def test_held_out_prompts_that_are_learned_from(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    one = values["world"]["one"]
    one["development"]["harmful"] = one["unsafe"]
    said: list[str] = []
    run_comparison(Plan(**values), tmp_path / "out", workers=1, warn=said.append)
    assert any("6 of 6 prompts of development harmful in training unsafe" in text for text in said)


def test_no_step_improved(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    """Such a run is no failure: it has the untreated model's figures, and is marked wherever it stands."""
    faked(FAKE_UNIMPROVED="random")
    found = run_comparison(Plan(**values), tmp_path / "out", workers=2)
    base, own = found.summaries[0], next(one for one in found.summaries if one.arm == "random")
    assert (own.n_failed, own.n_unimproved, base.n_unimproved) == (0, 2, 0)
    assert own.figures["attack"] == base.figures["attack"] and own.figures["kl"] == 0.0
    assert {row["unimproved"] for row in found.rows() if row["arm"] == "random"} == {True}
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "| random neurons (no step improved in 2) |" in text
    assert "| main, two, random, seed 1, development |" in text.split("## Runs in which no step")[1]
    html = (tmp_path / "out" / "report.html").read_text()
    assert "random neurons (no step improved in 2)" in html
    assert "main, two, random, seed 1, development: no step lowered the validation loss" in html
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {one["n_unimproved"] for one in results["summaries"] if one["arm"] == "random"} == {2}


def test_failed_runs_are_run_again(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """Only where it is asked for, and then they alone; the end is that of a comparison without failures."""
    whole = run_comparison(Plan(**values), tmp_path / "whole", workers=2)
    log = faked(FAKE_FAILS="random")
    found = run_comparison(Plan(**values), tmp_path / "out", workers=2)
    failed = sum(run.outcome.failed is not None for run in found.runs)
    assert failed == sum(run.task.arm == "random" for run in found.runs)
    monkeypatch.delenv("FAKE_FAILS")
    before = asked(log)
    run_comparison(Plan(**values), tmp_path / "out", workers=2)
    assert asked(log) == before
    run_comparison(Plan(**values), tmp_path / "out", workers=2, retry_failed=True)
    n_random = sum(run.task.arm == "random" for run in whole.runs)
    # its main runs are asked for with the setting that its sweep now chooses, if that is another one
    assert failed <= len(asked(log)) - len(before) <= n_random
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    before = asked(log)
    run_comparison(Plan(**values), tmp_path / "out", workers=2, retry_failed=True)
    assert asked(log) == before


def test_failed_runs_of_an_arm_that_is_left_out_are_kept(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    log = faked(FAKE_FAILS="random")
    run_comparison(Plan(**values), tmp_path / "out", workers=1)
    before = asked(log)
    fewer = merged(values, arms=["neurons"])
    run_comparison(Plan(**fewer), tmp_path / "out", workers=1, retry_failed=True)
    run_comparison(Plan(**values), tmp_path / "out", workers=1)
    assert asked(log) == before


def test_a_worker_that_died_is_told(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    faked(FAKE_DIES="random", FAKE_TIMES=tmp_path)
    (tmp_path / "death1").touch()
    said: list[str] = []
    run_comparison(Plan(**values), tmp_path / "out", workers=1, warn=said.append)
    (text,) = [one for one in said if "died" in one]
    assert text.startswith("sweep, one, random, seed 1000, development, setting")
    assert text.endswith(
        "its worker died (signal 9: killed for memory); the run is tried once more"
    )


def test_what_is_written_is_sealed(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_comparison(Plan(**values), out, workers=1)
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["files"]) == set(WRITTEN)
    for name, expected in manifest["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == expected
    assert manifest["sha256"] == seal_of(manifest)


def test_a_journal_that_was_changed(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    """It is not gone on with; tables and report are written anew, whatever became of them."""
    out = tmp_path / "out"
    run_comparison(Plan(**values), out, workers=1)
    (out / "tables.md").unlink()
    run_comparison(Plan(**values), out, workers=1)
    assert (out / "tables.md").is_file()
    journal = out / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"bare": 0', b'"bare": 1', 1))
    with pytest.raises(InputError, match=r"journal.jsonl is damaged.*begin anew with --restart"):
        run_comparison(Plan(**values), out, workers=1)
    run_comparison(Plan(**values), out, workers=1, restart=True)


def test_at_equal_seconds_an_arm_that_does_not_train_is_left_out(
    values: dict[str, Any], faked: Callable[..., Path], tmp_path: Path
) -> None:
    faked(FAKE_UNTRAINED="random")
    found = run_comparison(Plan(**values), tmp_path / "out", workers=1)
    equal = found.at_equal_seconds()["one"]
    assert equal["seconds"] == 9.5 and set(equal["arms"]) == {"neurons", "lora_r1"}
    assert found.untrained == ("random",) and not any(
        run.outcome.is_unimproved for run in found.runs
    )
    html = (tmp_path / "out" / "report.html").read_text()
    assert "Left out of this are arms that do not train: random neurons." in html
