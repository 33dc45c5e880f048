"""Work that is not finished yet, kept beside its output, so that the same command can go on with it."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from nest.artifacts.provenance import package_versions
from nest.artifacts.storage import held
from nest.errors import InputError, NestError

SUFFIX = ".unfinished"
_RUN, _JOURNAL = "run.json", "journal.jsonl"
# Names of what runs keep; other files in the folder are somebody's own and stay.
_KEPT = r"(run\.json|journal\.jsonl|state\.safetensors|activations-\d+\.f32)(\.tmp)?"


class Unfinished:
    """A folder for what a run has done so far.

        with Unfinished("patch.unfinished") as work:
            work.begin("patch", {"epochs": 2, ...})     # refuses what another run left there
            ...                                         # work.journal, work.path(...)

    It is gone after the block if that ends well, or if the run came to an end of its own that the same
    call would come to again (`forget`). Interrupted, failed or killed, it leaves what it has done.

    Args:
        folder: Made when the work begins.
        restart: Throw away what an earlier run left.
        warn: Told when versions or threads are others than in the run that is gone on with.

    Attributes:
        folder: It.
        goes_on: Whether an earlier run left something here, after `begin`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        restart: bool = False,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self.goes_on = False
        self._restart, self._warn = restart, warn
        self._stack = ExitStack()
        self._begun = self._has_done = self._is_full = False
        self._journal: Journal | None = None

    def __enter__(self) -> Unfinished:
        return self

    def begin(self, kind: str, identity: Mapping[str, Any]) -> None:
        """Take the folder; what is in it must be of a run with the same identity.

        Args:
            kind: Of the output.
            identity: All that the result depends on: settings, hashes of data and model. JSON values.

        Raises:
            InputError: another run's work is there, or another process is at work on it.
            NestError: the folder cannot be made.
        """
        run = {"kind": kind, "identity": dict(identity), "environment": _environment()}
        run = json.loads(json.dumps(run, default=str))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._stack.enter_context(held(self.folder)):
                raise InputError(
                    f"another nest is at work on {self.folder.name.removesuffix(SUFFIX)} (it holds "
                    f"{self.folder}); wait for it, or choose another name for the output"
                )
            file = self.folder / _RUN
            earlier = _read_run(file) if file.exists() else None
            if earlier is None or self._restart:
                if earlier is None:
                    self._refuse_strangers()
                _remove(self.folder, _names_in(self.folder))
                _write_whole(file, json.dumps(run, indent=1).encode())
            else:
                self._compare(earlier, run)
                self.goes_on = self._has_done = True
            self._begun = True  # from here on what is in it is this run's
        except OSError as fault:
            raise NestError(
                f"{self.folder} could not be made: {fault.strerror or fault}"
            ) from fault

    @property
    def journal(self) -> Journal:
        """What was done, line by line; opened when it is first asked for."""
        assert self._begun
        if self._journal is None:
            self._journal = Journal(self.folder / _JOURNAL, self._warn, self._note_done)
            self._stack.callback(self._journal.close)
        return self._journal

    def path(self, name: str) -> Path:
        """Where a file of the work stands; it goes with it."""
        return self.folder / name

    def write(self, name: str, content: bytes) -> None:
        """Replace a file, whole or not at all. A disk that takes no more ends the keeping, not the work."""
        if self._is_full:
            return
        try:
            _write_whole(self.folder / name, content)
        except OSError as fault:
            self._is_full = True
            (self.folder / f"{name}.tmp").unlink(missing_ok=True)
            _tell_full(self._warn, fault)
            return
        self._note_done()

    def forget(self) -> None:
        """The run has come to an end that the same call would come to again: nothing is kept for it."""
        self._has_done = False

    def _note_done(self) -> None:
        """From now on there is something to go on from."""
        self._has_done = True

    def _compare(self, then: dict[str, Any], now: dict[str, Any]) -> None:
        what = {key: (then.get(key), now[key]) for key in ("kind", "identity")}
        differences = [said for key, pair in what.items() for said in _differences(key, *pair)]
        if differences:
            raise InputError(
                f"{self.folder} holds the unfinished work of another run: {'; '.join(differences[:4])}"
                f"{'; ...' if len(differences) > 4 else ''}. Repeat that run to finish it, choose another "
                "name for the output, or begin anew with --restart (in Python: delete the folder, or give "
                "another one)"
            )
        others = _differences("environment", then.get("environment"), now["environment"])
        if others and self._warn is not None:
            self._warn(
                f"going on with work that was begun elsewhere ({'; '.join(others)}): the result can differ "
                "in its last bits from that of an undisturbed run"
            )

    def _refuse_strangers(self) -> None:
        """Nothing is deleted that may be somebody's own."""
        if any(not re.fullmatch(_KEPT, path.name) for path in self.folder.iterdir()):
            raise InputError(
                f"{self.folder} is where unfinished work is kept, but what is in it is not of nest; "
                "move it elsewhere"
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        finished = fault is None or not self._has_done
        if self._begun and fault is not None and not finished:
            fault.add_note(
                f"what is done so far is kept in {self.folder}: the same command goes on from there"
            )
        with self._stack:
            if self._begun and finished:
                with suppress(OSError):  # what stays is found by the next run
                    _remove(self.folder, _names_in(self.folder))
                    self.folder.rmdir()


class Journal:
    """Lines of JSON, each written at once; one that a kill has cut is dropped.

    Args:
        path: The file; made if it is not there.
        warn: Told when the disk takes no more.
        added: Called with every line.

    Attributes:
        entries: What was in it when it was opened.
    """

    def __init__(
        self,
        path: Path,
        warn: Callable[[str], None] | None = None,
        added: Callable[[], None] = lambda: None,
    ) -> None:
        self._warn, self._added = warn, added
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        self.entries: list[dict[str, Any]] = []
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                self.entries.append(dict(json.loads(line)))
            except (ValueError, TypeError) as fault:
                raise InputError(
                    f"{path}, line {number} is damaged ({fault}); begin anew with --restart"
                ) from None
        self._file: Any = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self._file.truncate(len(whole))
        self._file.seek(len(whole))

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append a line. A disk that takes no more ends the journal, and not the work."""
        if self._file is None:
            return
        try:
            written, line = 0, json.dumps(entry).encode() + b"\n"
            while written < len(line):
                written += self._file.write(line[written:])
            self._added()
        except OSError as fault:
            self.close()
            _tell_full(self._warn, fault)

    def close(self) -> None:
        """Nothing is added any more."""
        if self._file is not None:
            self._file.close()
            self._file = None


@contextmanager
def as_work(
    work: str | Path | Unfinished | None, warn: Callable[[str], None] | None = None
) -> Iterator[Unfinished | None]:
    """A folder's work for the time of the block; one that the caller opened stays open."""
    if work is None or isinstance(work, Unfinished):
        yield work
        return
    with Unfinished(work, warn=warn) as opened:
        yield opened


def beside(out: Path) -> Path:
    """Where the unfinished work for an output is kept."""
    whole = out.expanduser().resolve()
    return whole.with_name(whole.name + SUFFIX)


def _read_run(file: Path) -> dict[str, Any]:
    try:
        run = json.loads(file.read_bytes())
    except ValueError:
        run = None
    if not isinstance(run, dict) or "identity" not in run:
        raise InputError(
            f"{file} is damaged, or not of nest; move its folder elsewhere, or delete it yourself"
        )
    return run


def _tell_full(warn: Callable[[str], None] | None, fault: OSError) -> None:
    if warn is not None:
        warn(
            f"what is done can no longer be kept ({fault.strerror or fault}): if this run is interrupted, "
            "it goes on from what was kept before"
        )


def _differences(name: str, then: Any, now: Any) -> list[str]:
    """What differs, one phrase each, in nested values by their dotted name."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted({*then, *now})
        return [
            said
            for key in keys
            for said in _differences(
                key if name in ("identity", "environment") else f"{name}.{key}",
                then.get(key),
                now.get(key),
            )
        ]
    return [] if then == now else [f"{name} was {_short(then)} and is {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:18]}...{text[-18:]}"


def _environment() -> dict[str, Any]:
    """What may change the last bits of a result, though not what it means."""
    import torch

    return {
        "versions": package_versions(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _names_in(folder: Path) -> list[str]:
    """Files that runs keep, in the order in which they may go: first what says that others are whole.

    A kill in between leaves a run that begins anew, and never one that goes on from half of its files.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()]
    kept = [name for name in names if re.fullmatch(_KEPT, name)]
    return sorted(kept, key=lambda name: (name == _RUN, not name.startswith("journal"), name))


def _remove(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _write_whole(path: Path, content: bytes) -> None:
    """Under a temporary name, onto the disk, and into place."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
