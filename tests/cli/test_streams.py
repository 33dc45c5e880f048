"""Standard streams as they may be, names with markup in them, and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from driver import ROOT, Nest, World, as_user, select_arguments

from nest.cli.progress import ProgressLines, duration

FULL = Path("/dev/full")


def shell(
    arguments: list[object], redirection: str, **env: str
) -> subprocess.CompletedProcess[str]:
    """`nest ARGUMENTS` with its streams as a shell's redirection makes them."""
    code = "from nest.cli.main import run\nrun()"
    paths = [str(ROOT), *(path for path in sys.path if path)]
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def select(world: World, out: Path) -> list[object]:
    return [*select_arguments(world.model, world.data, out)]


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "0<&- >&- 2>&-"])
def test_closed_streams_stop_nothing(world: World, tmp_path: Path, closed: str) -> None:
    done = shell([*select(world, tmp_path / "out"), "--json"], closed)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
def test_a_result_that_cannot_be_printed_is_kept(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = shell(["inspect", world.patch, "--json"], "> /dev/full")
    assert (
        done.returncode == 1 and "Traceback" not in done.stderr and "Exception" not in done.stderr
    )
    assert "could not be printed (No space left on device); it is in" in done.stderr
    (kept,) = tmp_path.glob("nest-result-*.json")
    assert json.loads(kept.read_text())["kind"] == "patch"


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
def test_notes_that_nobody_can_read_stop_nothing(world: World, tmp_path: Path) -> None:
    done = shell([*select(world, tmp_path / "out"), "--json"], "2> /dev/full")
    assert done.returncode == 0 and json.loads(done.stdout)["neurons"] > 0


def test_an_encoding_of_long_ago(world: World, tmp_path: Path) -> None:
    out = tmp_path / "größe → 大"
    done = shell(select(world, out), "", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert "\\xf6\\xdfe" in done.stdout and out.exists()


# --- what users name is printed as it is ----------------------------------------------------------


def test_markup_in_names_is_text(world: World, nest: Nest, tmp_path: Path) -> None:
    attacks = tmp_path / "attacks.jsonl"
    row = {"name": "close [/INST] :smile: $a_b$", "template": "{prompt} [/INST]"}
    attacks.write_text(json.dumps(row) + "\n")
    out = tmp_path / "run [v2] [/bold]" / ("x" * 90)
    sets = ("--harmful", world.data["harmful"], "--max-new-tokens", 4)
    done = nest("eval", "--model", world.model, *sets, "--attacks", attacks, "--out", out)
    assert done.code == 0 and "Traceback" not in done.err
    assert f"wrote {out / 'eval.json'}" in done.out  # whole, in one line
    assert ":smile:" in done.out.replace("\n", "")
    said = nest("eval", "--model", "[/bold] none", "--harmful", world.data["harmful"]).error
    assert "[/bold] none" in said


def test_a_toml_file_of_notepads(world: World, nest: Nest, tmp_path: Path) -> None:
    config = tmp_path / "nest.toml"
    config.write_bytes("\ufeffz = 1.0\r\n".encode())
    bare = select_arguments(world.model, world.data, tmp_path / "out")
    arguments = [a for a in bare if a not in ("--z", "1")]
    assert nest(*arguments, "--config", config).code == 0


# --- signals --------------------------------------------------------------------------------------

SLOW_COPY = """
import nest.patches.checkpoint as c, time
real = c._carry_along
def slow(*args, **kwargs):
    print("copying", flush=True)
    time.sleep(30)
    return real(*args, **kwargs)
c._carry_along = slow
"""


def started(arguments: list[object], before: str = "") -> subprocess.Popen[str]:
    code = f"{before}\nfrom nest.cli.main import run\nrun()"
    paths = [str(ROOT), *(path for path in sys.path if path)]
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_cleans_up(world: World, tmp_path: Path, name: str) -> None:
    fold = ["fold", "--model", world.model, "--patch", world.patch, "--out", tmp_path / "folded"]
    heard = f"import signal\nsignal.signal(signal.{name}, signal.SIG_DFL)\n"
    heard += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = started(fold, heard + SLOW_COPY)
    assert process.stdout is not None and process.stdout.readline() == "copying\n"
    assert [path.name[:8] for path in tmp_path.iterdir()] == [".folded."]
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name)
    assert "interrupted; nothing half-written was left" in said
    assert list(tmp_path.iterdir()) == []


def test_what_nohup_ignores_stays_ignored(world: World, tmp_path: Path) -> None:
    fold = ["fold", "--model", world.model, "--patch", world.patch, "--out", tmp_path / "folded"]
    ignoring = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    process = started(fold, ignoring + SLOW_COPY.replace("30", "1"))
    assert process.stdout is not None and process.stdout.readline() == "copying\n"
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_stop_that_an_import_swallows_is_not_lost(world: World, tmp_path: Path) -> None:
    """A library's import may turn KeyboardInterrupt into an error of its own, or into nothing."""
    for then in ("pass", "raise ImportError('Could not import module LlamaConfig')"):
        swallowing = (
            "import os, signal, nest.models.loading as l\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "real = l.load_weights\n"
            "def hit(*args, **kwargs):\n"
            "    try:\n"
            "        os.kill(os.getpid(), signal.SIGINT)\n"
            f"    except KeyboardInterrupt:\n        {then}\n"
            "    return real(*args, **kwargs)\n"
            "l.load_weights = hit\n"
        )
        done = as_user(*select(world, tmp_path / "out"), before=swallowing)
        assert done.code == 130 and "interrupted" in done.err, (then, done)
        assert list(tmp_path.iterdir()) == []


def test_a_stop_in_the_middle_of_an_import_waits_for_its_end(world: World, tmp_path: Path) -> None:
    """A library in C++ may abort where an exception comes through its import."""
    (tmp_path / "heavy.py").write_text(
        "import os, signal, time\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(0.1)\n"
        "print('imported', flush=True)\n"
    )
    importing = (
        f"import sys, nest.models.loading as l\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "real = l.load_weights\n"
        "def loading(*args, **kwargs):\n"
        "    import heavy\n"
        "    import time\n"
        "    time.sleep(30)\n"
        "l.load_weights = loading\n"
    )
    done = as_user(*select(world, tmp_path / "out"), before=importing)
    assert (done.code, done.out.strip()) == (143, "imported")
    assert "interrupted" in done.err


def test_a_stop_before_there_is_a_command_is_told_as_well(world: World, tmp_path: Path) -> None:
    early = (
        "import os, signal, nest.cli.main as m\n"
        "m.app = lambda tokens: os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = as_user(*select(world, tmp_path / "out"), before=early)
    assert done.code == 143
    assert "interrupted" in done.err and "Traceback" not in done.err


def test_the_next_run_removes_what_a_killed_one_left(world: World, tmp_path: Path) -> None:
    fold = ["fold", "--model", world.model, "--patch", world.patch, "--out", tmp_path / "folded"]
    process = started(fold, SLOW_COPY)
    assert process.stdout is not None and process.stdout.readline() == "copying\n"
    other = as_user(*fold[:-1], tmp_path / "folded")  # while the first is at it
    assert other.code == 0 and len(list(tmp_path.iterdir())) == 2
    process.kill()
    process.communicate()
    assert as_user(*fold, "--overwrite").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["folded"]


# --- progress without a terminal ------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_line_at_most_every_ten_seconds() -> None:
    clock, lines = Clock(), []
    show: Any = ProgressLines(lines.append, clock)
    for step in range(100):
        clock.now += 1.0
        show("tune", step + 1, 200)
    assert len(lines) == 10
    assert lines[0] == "tune: 10/200, 1/s, 3 min 10 s left"
    clock.now += 9.0
    show("generate", 5, 50)
    clock.now += 9.0
    show("generate", 10, 50)
    assert len(lines) == 11 and lines[-1] == "generate: 10/50, 0.556/s, 1 min 12 s left"


def test_short_runs_say_nothing(world: World, nest: Nest, tmp_path: Path) -> None:
    assert nest(*select(world, tmp_path / "out"), "--json").err == ""


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59, 61, 3599, 7300)] == [
        *("0 s", "59 s", "1 min 01 s", "59 min 59 s", "2 h 01 min"),
    ]


def test_progress_lines_come_where_stderr_is_no_terminal(world: World, tmp_path: Path) -> None:
    hasty = "import nest.cli.progress as p\np.SECONDS_BETWEEN_LINES = 0.0"
    loud = as_user(*select(world, tmp_path / "a"), "--json", before=hasty)
    assert "capture activations: 24/48" in loud.err or "capture activations: 48/48" in loud.err
    quiet = as_user(*select(world, tmp_path / "b"), "--json", "--quiet", before=hasty)
    assert quiet.err == ""
