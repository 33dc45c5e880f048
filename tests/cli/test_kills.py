"""Select, tune and eval are killed at any moment; the same command goes on, to the same bytes.

NEST_KILLS=20 python -m pytest tests/cli/test_kills.py --slow -s     # at random moments, many times
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from driver import ROOT, as_user, everything_under, select_arguments, tune_arguments

KILLS = int(os.environ.get("NEST_KILLS", "4"))

# Ends the process as `kill -9` does, at the n-th call of a function.
DYING = """
import os, signal, importlib
def dying(path, n, real=None, before=True):
    module, name = path.rsplit(":", 1)
    home = importlib.import_module(module)
    owner, _, attribute = name.rpartition(".")
    home = getattr(home, owner) if owner else home
    real, count = getattr(home, attribute), [0]
    def called(*args, **kwargs):
        count[0] += 1
        if count[0] == n and before:
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*args, **kwargs)
        if count[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    setattr(home, attribute, called)
"""


def produced(folder: Path, out: Path) -> dict[str, bytes]:
    """What a run wrote, but for how long it took."""
    assert [path.name for path in folder.iterdir() if path.name.startswith(out.name)] == [out.name]
    files = everything_under(out)
    return {name: content for name, content in files.items() if not name.endswith("timing.json")}


@pytest.mark.parametrize(
    ("where", "n", "before"),
    [
        ("nest.selection.capture:_Store.write", 3, True),
        ("nest.selection.capture:_Store.keep", 5, False),
        ("nest.artifacts.unfinished:Journal.add", 5, True),
        ("nest.selection.select:fit_probe", 3, False),
        ("nest.artifacts.storage:_move_into_place", 1, True),
    ],
)
def test_selection_goes_on(world, tmp_path: Path, where: str, n: int, before: bool) -> None:
    out = tmp_path / "out"
    arguments = [*select_arguments(world.model, world.data, out), "--batch-size", 4]
    dying = f"{DYING}\nimport nest.selection.capture as c\nc.KEPT_EVERY_SECONDS = 0\n"
    killed = as_user(*arguments, before=f"{dying}dying({where!r}, {n}, before={before})")
    assert killed.code == -signal.SIGKILL and not out.exists()
    assert as_user(*arguments).code == 0
    whole = tmp_path / "whole" / "out"
    assert as_user(*select_arguments(world.model, world.data, whole), "--batch-size", 4).code == 0
    assert produced(tmp_path, out) == produced(whole.parent, whole)


@pytest.mark.parametrize("options", [(), ("--layers", "1:"), ("--micro-batch-size", "3")], ids=str)
@pytest.mark.parametrize("kills", [(2, 3), (7,), (1, 9)], ids=str)
def test_tuning_goes_on(
    world, tmp_path: Path, kills: tuple[int, ...], options: tuple[str, ...]
) -> None:
    def arguments(out: Path) -> list[object]:
        common = tune_arguments(world.model, world.selection, world.data, out)
        longer = ("--max-steps", 12, "--batch-size", 8, "--validation", 0.2)
        return [*common, *longer, *options, "--checkpoint-every", 1]

    out = tmp_path / "out"
    for n in kills:
        die = f"{DYING}\ndying('nest.tuning.loop:TrainingLoop._step', {n}, before=False)"
        assert as_user(*arguments(out), before=die).code == -signal.SIGKILL
    done = as_user(*arguments(out))
    assert done.code == 0 and "going on with what is kept" in done.err
    whole = tmp_path / "whole" / "out"
    assert as_user(*arguments(whole)).code == 0
    assert produced(tmp_path, out) == produced(whole.parent, whole)


@pytest.mark.parametrize("engine", ["static", "paged"])
@pytest.mark.parametrize(
    ("where", "n"),
    [
        ("nest.artifacts.unfinished:Journal.add", 2),
        ("nest.evaluation.judges:PhraseJudge.judge_harmless", 1),
        ("nest.evaluation.report:_write", 3),
    ],
)
def test_evaluation_goes_on(world, tmp_path: Path, where: str, n: int, engine: str) -> None:
    def arguments(out: Path) -> list[object]:
        sets = ("--harmful", world.data["harmful"], "--borderline", world.data["safe"])
        more = ("--benign", world.data["benign"], "--attacks", "uppercase", "--max-new-tokens", 6)
        how = ("--batch-size", 8, "--engine", engine, "--patch", world.patch)
        return ["eval", "--model", world.model, *sets, *more, *how, "--out", out]

    out = tmp_path / "out"
    die = f"{DYING}\ndying({where!r}, {n}, before=False)"
    assert as_user(*arguments(out), before=die).code == -signal.SIGKILL
    assert as_user(*arguments(out), "--overwrite").code == 0
    whole = tmp_path / "whole" / "out"
    assert as_user(*arguments(whole)).code == 0
    assert produced(tmp_path, out) == produced(whole.parent, whole)


def test_other_settings_are_refused_and_restart_begins_anew(world, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [*tune_arguments(world.model, world.selection, world.data, out)]
    every = ("--checkpoint-every", 1)
    die = f"{DYING}\ndying('nest.tuning.loop:TrainingLoop._step', 4, before=False)"
    assert as_user(*arguments, *every, before=die).code == -signal.SIGKILL
    said = as_user(*arguments, "--kl-weight", 0.5).error
    assert "out.unfinished holds the unfinished work of another run" in said
    assert "config.kl_weight was 1.0 and is 0.5" in said and "--restart" in said
    assert (tmp_path / "out.unfinished" / "state.safetensors").exists()
    other = [*arguments, "--kl-weight", 0.5, "--restart"]
    assert as_user(*other).code == 0
    whole = tmp_path / "whole" / "out"
    again = tune_arguments(world.model, world.selection, world.data, whole)
    assert as_user(*again, "--kl-weight", 0.5).code == 0
    assert produced(tmp_path, out) == produced(whole.parent, whole)


def test_a_checkpoint_of_other_data_or_damaged_is_refused(world, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [*tune_arguments(world.model, world.selection, world.data, out)]
    die = f"{DYING}\ndying('nest.tuning.loop:TrainingLoop._step', 4, before=False)"
    assert as_user(*arguments, "--checkpoint-every", 1, before=die).code == -signal.SIGKILL
    swapped = ["--harmful" if a == "--benign" else a for a in map(str, arguments)]
    swapped[arguments.index("--harmful")] = "--benign"
    said = as_user(*swapped, "--no-check-refusals").error
    assert "prompts.harmful was" in said
    state = tmp_path / "out.unfinished" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-20])
    assert "state.safetensors is damaged" in as_user(*arguments).error


def test_two_at_once_do_not_share_their_work(world, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [*select_arguments(world.model, world.data, out)]
    from nest.artifacts.unfinished import Unfinished, beside

    with Unfinished(beside(out)) as held:
        held.begin("selection", {})
        said = as_user(*arguments).error
    assert "another nest is at work on out" in said
    assert as_user(*arguments).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["select", "tune", "eval"])
def test_kills_at_random_moments(command: str, tmp_path: Path) -> None:
    """On the embedded model, with -9 and TERM, from the first import to the last rename."""
    from nest.organism import model_folder

    model = str(model_folder())
    chosen = tmp_path / "chosen"
    small = ("--unsafe", "organism:unsafe", "--safe", "organism:safe", "--z", "1.5")
    assert as_user("select", "--model", model, *small, "--out", chosen).code == 0

    def arguments(out: Path) -> list[str]:
        own = {
            "select": (*small, "--batch-size", 2),
            "tune": (
                *("--clusters", chosen, "--harmful", "organism:harmful", "--benign"),
                *("organism:benign", "--max-steps", 90, "--checkpoint-every", 3),
            ),
            "eval": (
                *("--harmful", "organism:test_harmful", "--benign", "organism:test_benign"),
                *("--attacks", "organism:wrappers_held_out", "--batch-size", 32),
                *("--max-new-tokens", 40),
            ),
        }[command]
        return [command, "--model", model, *map(str, own), "--out", str(out)]

    whole = tmp_path / "whole" / "out"
    started = time.monotonic()
    assert as_user(*arguments(whole)).code == 0
    seconds = time.monotonic() - started
    out, kills, tries = tmp_path / "out", 0, 0
    rng = random.Random(command)
    while not out.exists() or (command == "eval" and not (out / "eval.json").exists()):
        tries += 1
        wait = rng.uniform(0.0, seconds) if kills < KILLS else 600.0
        number = rng.choice((signal.SIGKILL, signal.SIGTERM))
        code, stopped = _run(arguments(out), wait, number)
        kills += stopped
        assert code in (0, -signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM), code
        if code == 0 and kills < KILLS and tries < 10 * KILLS:
            # it was done before all kills had come: once more from the beginning
            assert produced(tmp_path, out) == produced(whole.parent, whole)
            _remove(out)
    print(f"{command}: {kills} kills, {tries} runs, {seconds:.0f} s undisturbed")
    assert kills >= KILLS
    assert produced(tmp_path, out) == produced(whole.parent, whole)
    assert not list(tmp_path.glob(".*.tmp"))


def _run(arguments: Sequence[str], wait: float, number: int) -> tuple[int, bool]:
    paths = [str(ROOT), *(path for path in sys.path if path)]
    process = subprocess.Popen(
        [sys.executable, "-c", "from nest.cli.main import run\nrun()", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return process.wait(wait), False
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        return process.wait(60), True


def _remove(out: Path) -> None:
    import shutil

    shutil.rmtree(out)
