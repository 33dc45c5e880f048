"""Select, tune and eval are killed at any moment; the same command goes on, to the same bytes.

NEST_KILLS=20 python -m pytest tests/cli/test_kills.py --slow -s     # at random moments, many times
"""

from __future__ import annotations

import importlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from driver import (
    ROOT,
    Finished,
    World,
    as_user,
    everything_under,
    select_arguments,
    tune_arguments,
    with_options,
)

from nest.artifacts.unfinished import Unfinished, beside

KILLS = int(os.environ.get("NEST_KILLS", "4"))

Death = tuple[str, int, bool]
"""A function as `module:name`, at which of its calls the process dies, and whether before it runs."""

# A forked child has all imports done: a process of its own would spend three seconds on them.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")


def forked(arguments: Sequence[object], death: Death | None = None) -> Finished:
    """`nest ARGUMENTS` in a child that dies as by `kill -9` where it is told to."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            _child(list(map(str, arguments)), death, out.fileno(), err.fileno())
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return Finished(os.waitstatus_to_exitcode(status), out.read(), err.read())


def _child(arguments: list[str], death: Death | None, out: int, err: int) -> NoReturn:
    code: object = 1
    try:
        # pytest's own capture would hold back what is written
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = open(1, "w")  # noqa: SIM115 - for the rest of the child
        sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
        if death is not None:
            _die_at(*death)
        sys.argv = ["nest", *arguments]
        from nest.cli.main import run

        run()
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _die_at(path: str, n: int, before: bool) -> None:
    module, name = path.split(":")
    home: Any = importlib.import_module(module)
    *owners, attribute = name.split(".")
    for owner in owners:
        home = getattr(home, owner)
    real, count = getattr(home, attribute), itertools.count(1)

    def called(*args: Any, **kwargs: Any) -> Any:
        now = next(count) == n
        if now and before:
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*args, **kwargs)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(home, attribute, called)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured is noted after every batch, and not every few seconds."""
    monkeypatch.setattr("nest.activations.store.KEPT_EVERY_SECONDS", 0.0)


def produced(folder: Path, out: Path) -> dict[str, bytes]:
    """What a run wrote, but for how long it took."""
    assert [path.name for path in folder.iterdir() if path.name.startswith(out.name)] == [out.name]
    files = everything_under(out)
    return {name: content for name, content in files.items() if not name.endswith("timing.json")}


@pytest.mark.parametrize(
    "death",
    [
        ("nest.activations.store:ActivationStore.write", 3, True),
        ("nest.activations.store:ActivationStore.keep", 5, False),
        ("nest.artifacts.unfinished:Journal.add", 5, True),
        ("nest.selection.select:fit_probe", 3, False),
        ("nest.artifacts.storage:_move_into_place", 1, True),
    ],
    ids=str,
)
def test_selection_goes_on(world: World, tmp_path: Path, death: Death) -> None:
    def arguments(out: Path) -> list[object]:
        return [*select_arguments(world.model, world.data, out), "--batch-size", 4]

    out, whole = tmp_path / "out", tmp_path / "whole" / "out"
    killed = forked(arguments(out), death)
    assert killed.code == -signal.SIGKILL and not out.exists(), killed.err
    for folder in (out, whole):
        assert forked(arguments(folder)).code == 0
    assert produced(tmp_path, out) == produced(whole.parent, whole)


def test_learning_neurons_goes_on(world: World, tmp_path: Path) -> None:
    def arguments(out: Path) -> list[object]:
        return [
            *("select", "--model", world.model, "--scorer", "learned", "--neurons", 12),
            *("--harmful", world.data["harmful"], "--benign", world.data["benign"], "--out", out),
        ]

    out, whole = tmp_path / "out", tmp_path / "whole" / "out"
    killed = forked(arguments(out), ("nest.tuning.loop:TrainingLoop._step", 2, True))
    assert killed.code == -signal.SIGKILL and not out.exists(), killed.err
    for folder in (out, whole):
        assert forked(arguments(folder)).code == 0
    assert produced(tmp_path, out) == produced(whole.parent, whole)


@pytest.mark.parametrize("options", [(), ("--layers", "1:"), ("--micro-batch-size", "3")], ids=str)
@pytest.mark.parametrize("kills", [(2, 3), (7,), (1, 9)], ids=str)
def test_tuning_goes_on(
    world: World, tmp_path: Path, kills: tuple[int, ...], options: tuple[str, ...]
) -> None:
    def arguments(out: Path) -> list[object]:
        common = tune_arguments(world.model, world.selection, world.data, out)
        longer = ("--max-steps", 12, "--batch-size", 8, "--validation", 0.2)
        return with_options(common, *longer, *options, "--checkpoint-every", 1)

    out, whole = tmp_path / "out", tmp_path / "whole" / "out"
    for n in kills:
        killed = forked(arguments(out), ("nest.tuning.loop:TrainingLoop._step", n, False))
        assert killed.code == -signal.SIGKILL, killed.err
    done = forked(arguments(out))
    assert done.code == 0 and "going on with what is kept" in done.err, done.err
    assert forked(arguments(whole)).code == 0
    assert produced(tmp_path, out) == produced(whole.parent, whole)


@pytest.mark.parametrize("engine", ["static", "paged"])
@pytest.mark.parametrize(
    "death",
    [
        ("nest.artifacts.unfinished:Journal.add", 2, False),
        ("nest.judging.phrases:PhraseJudge.judge", 2, False),
        ("nest.evaluation.report:_write", 3, False),
    ],
    ids=str,
)
def test_evaluation_goes_on(world: World, tmp_path: Path, death: Death, engine: str) -> None:
    def arguments(out: Path) -> list[object]:
        sets = ("--harmful", world.data["harmful"], "--borderline", world.data["safe"])
        more = ("--benign", world.data["benign"], "--attacks", "uppercase", "--max-new-tokens", 6)
        how = ("--batch-size", 8, "--engine", engine, "--patch", world.patch)
        return ["eval", "--model", world.model, *sets, *more, *how, "--out", out]

    out, whole = tmp_path / "out", tmp_path / "whole" / "out"
    killed = forked(arguments(out), death)
    assert killed.code == -signal.SIGKILL, killed.err
    for folder, more in ((out, ["--overwrite"]), (whole, [])):
        done = forked([*arguments(folder), *more])
        assert done.code == 0, done.err
    assert produced(tmp_path, out) == produced(whole.parent, whole)


AFTER_FOUR_STEPS: Death = ("nest.tuning.loop:TrainingLoop._step", 4, False)


def test_other_settings_are_refused_and_restart_begins_anew(world: World, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole" / "out"
    arguments = [*tune_arguments(world.model, world.selection, world.data, out)]
    forked([*arguments, "--checkpoint-every", 1], AFTER_FOUR_STEPS)
    said = forked([*arguments, "--kl-weight", 0.5]).error
    assert "out.unfinished holds the unfinished work of another run" in said
    assert "config.kl_weight was 1.0 and is 0.5" in said and "--restart" in said
    assert (tmp_path / "out.unfinished" / "state.safetensors").exists()
    assert forked([*arguments, "--kl-weight", 0.5, "--restart"]).code == 0
    again = tune_arguments(world.model, world.selection, world.data, whole)
    assert forked([*again, "--kl-weight", 0.5]).code == 0
    assert produced(tmp_path, out) == produced(whole.parent, whole)


def test_a_checkpoint_of_other_data_or_damaged_is_refused(world: World, tmp_path: Path) -> None:
    arguments = [*tune_arguments(world.model, world.selection, world.data, tmp_path / "out")]
    forked([*arguments, "--checkpoint-every", 1], AFTER_FOUR_STEPS)
    data = {**world.data, "harmful": world.data["benign"], "benign": world.data["harmful"]}
    swapped = tune_arguments(world.model, world.selection, data, tmp_path / "out")
    said = forked([*swapped, "--no-check-refusals"]).error
    assert "prompts.harmful was" in said
    state = tmp_path / "out.unfinished" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-20])
    assert "state.safetensors is damaged" in forked(arguments).error


def test_two_at_once_do_not_share_their_work(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [*select_arguments(world.model, world.data, out)]
    with Unfinished(beside(out)) as held:
        held.begin("selection", {})
        assert "another nest is at work on out" in as_user(*arguments).error
    assert forked(arguments).code == 0


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
                *("--harmful", "organism:dev_harmful", "--benign", "organism:dev_benign"),
                *("--attacks", "organism:wrappers_dev", "--batch-size", 32),
                *("--max-new-tokens", 40),
            ),
        }[command]
        return [command, "--model", model, *map(str, own), "--out", str(out)]

    whole = tmp_path / "whole" / "out"
    started = time.monotonic()
    assert as_user(*arguments(whole)).code == 0
    seconds = time.monotonic() - started
    out, kills, finished = tmp_path / "out", 0, 0
    rng = random.Random(command)
    while kills < KILLS or not finished:
        wait = rng.uniform(0.0, seconds) if kills < KILLS else 600.0
        number = rng.choice((signal.SIGKILL, signal.SIGTERM))
        # killed after the last rename, the output is there: the same command asks to overwrite it
        code, stopped = _run([*arguments(out), "--overwrite"], wait, number)
        kills += stopped
        assert code in (0, -signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM), code
        if code == 0:  # once more from the beginning, if not all kills have come
            assert produced(tmp_path, out) == produced(whole.parent, whole)
            assert not list(tmp_path.glob(".*.tmp"))
            finished += 1
            shutil.rmtree(out)
    print(f"{command}: {kills} kills, {finished} times to the end, {seconds:.0f} s undisturbed")


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
