"""Work beside its output: kept when it can be gone on with, refused when it is another's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nest.artifacts.unfinished import Unfinished, _names_in, beside
from nest.errors import ActivationError, InputError, NestError

IDENTITY = {"config": {"epochs": 2, "seed": 0}, "model": "a" * 64}


def begun(folder: Path, **more: object) -> Unfinished:
    work = Unfinished(folder, **more)
    work.begin("patch", IDENTITY)
    return work


def interrupted(folder: Path, fault: BaseException) -> None:
    with pytest.raises(type(fault)), begun(folder) as work:
        work.journal.add({"done": 1})
        work.write("state.safetensors", b"whole")
        raise fault


def test_what_is_finished_leaves_nothing(tmp_path: Path) -> None:
    with begun(beside(tmp_path / "out")) as work:
        work.journal.add({"done": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fault", [KeyboardInterrupt(), NestError("disk"), InputError("memory"), MemoryError()]
)
def test_what_can_be_gone_on_with_is_kept(tmp_path: Path, fault: BaseException) -> None:
    interrupted(tmp_path / "w", fault)
    assert "the same command goes on from there" in fault.__notes__[0]
    with begun(tmp_path / "w") as work:
        assert work.goes_on and work.journal.entries == [{"done": 1}]
        assert work.path("state.safetensors").read_bytes() == b"whole"


def test_what_would_end_so_again_is_not(tmp_path: Path) -> None:
    with pytest.raises(ActivationError), begun(tmp_path / "w") as work:
        work.journal.add({"done": 1})
        work.forget()
        raise ActivationError("x")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_it_is_removed_leaves_a_run_that_begins_anew(tmp_path: Path) -> None:
    interrupted(tmp_path / "w", KeyboardInterrupt())
    names = _names_in(tmp_path / "w")
    assert names[0] == "journal.jsonl" and names[-1] == "run.json"
    for n in range(1, len(names) + 1):
        interrupted(tmp_path / "w", KeyboardInterrupt())
        for name in names[:n]:
            (tmp_path / "w" / name).unlink()
        with begun(tmp_path / "w") as work:
            assert work.journal.entries == [] and (
                n < 2 or not work.path("state.safetensors").exists()
            )


def test_nothing_done_is_nothing_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), begun(tmp_path / "w"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_another_runs_work_is_refused_by_what_differs_and_stays(tmp_path: Path) -> None:
    interrupted(tmp_path / "w", KeyboardInterrupt())
    other = {"config": {"epochs": 3, "seed": 0, "clip": 1}, "model": "a" * 64}
    with (
        pytest.raises(
            InputError, match=r"config\.clip was null and is 1; config\.epochs was 2 and is 3"
        ),
        Unfinished(tmp_path / "w") as work,
    ):
        work.begin("patch", other)
    with begun(tmp_path / "w") as work:
        assert work.goes_on
    interrupted(tmp_path / "w", KeyboardInterrupt())
    with Unfinished(tmp_path / "w", restart=True) as work:
        work.begin("patch", other)
        assert (
            not work.goes_on
            and not work.journal.entries
            and not work.path("state.safetensors").exists()
        )


def test_another_environment_is_warned_of(tmp_path: Path) -> None:
    interrupted(tmp_path / "w", KeyboardInterrupt())
    run = tmp_path / "w" / "run.json"
    content = json.loads(run.read_text())
    content["environment"]["threads"] = 999
    run.write_text(json.dumps(content))
    told: list[str] = []
    with begun(tmp_path / "w", warn=told.append) as work:
        assert work.goes_on
    assert len(told) == 1 and "threads was 999" in told[0]


def test_a_line_that_a_kill_cut_is_dropped_and_a_damaged_one_told(tmp_path: Path) -> None:
    interrupted(tmp_path / "w", KeyboardInterrupt())
    journal = tmp_path / "w" / "journal.jsonl"
    with journal.open("ab") as file:
        file.write(b'{"done": 2')
    with pytest.raises(KeyboardInterrupt), begun(tmp_path / "w") as work:
        assert work.journal.entries == [{"done": 1}]
        work.journal.add({"done": 3})
        raise KeyboardInterrupt
    lines = journal.read_bytes()
    assert lines == b'{"done": 1}\n{"done": 3}\n'
    journal.write_bytes(b"garbage\n" + lines)
    with (
        pytest.raises(InputError, match=r"journal\.jsonl, line 1 is damaged"),
        begun(tmp_path / "w") as work,
    ):
        assert work.journal


def test_what_is_somebody_elses_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.txt").write_text("all of it")
    for restart in (False, True):
        with (
            pytest.raises(InputError, match="not of nest"),
            Unfinished(tmp_path / "w", restart=restart) as work,
        ):
            work.begin("patch", IDENTITY)
    assert (tmp_path / "w" / "thesis.txt").read_text() == "all of it"


def test_a_disk_that_takes_no_more_ends_the_journal_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    with begun(tmp_path / "w", warn=told.append) as work:
        journal = work.journal

        class Full:
            def write(self, _line: bytes) -> int:
                raise OSError(28, "No space left on device")

            def close(self) -> None:
                pass

        journal.close()
        monkeypatch.setattr(journal, "_file", Full())
        journal.add({"done": 1})
        journal.add({"done": 2})
    assert len(told) == 1 and "No space left on device" in told[0]


def test_a_run_json_of_another_program_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"my": "own"}')
    (tmp_path / "thesis.txt").write_text("all of it")
    for restart in (False, True):
        work = Unfinished(tmp_path, restart=restart)
        with pytest.raises(InputError, match="not of nest"), work:
            work.begin("patch", IDENTITY)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_state_that_the_disk_does_not_take_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    told: list[str] = []
    with begun(tmp_path / "w", warn=told.append) as work:
        monkeypatch.setattr("nest.artifacts.unfinished._write_whole", full)
        work.write("state.safetensors", b"1")
        work.write("state.safetensors", b"2")
    assert len(told) == 1 and "No space left on device" in told[0]


def test_beside_the_folder_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert beside(Path(".")) == tmp_path / "out.unfinished"
