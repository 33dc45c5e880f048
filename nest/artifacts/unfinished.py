"""Work that is not finished yet, kept beside its output, so that the same command can go on with it."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from nest.artifacts.provenance import package_versions
from nest.artifacts.storage import held
from nest.errors import (
    ActivationError,
    InputError,
    LayoutError,
    NestError,
    PatchError,
    SelectionError,
)

SUFFIX = ".unfinished"
_RUN, _JOURNAL = "run.json", "journal.jsonl"
# Where one of these ended a run, the same command would end so again: nothing is kept for it.
_FINAL = (InputError, LayoutError, ActivationError, SelectionError, PatchError)


class Unfinished:
    """A folder for what a run has done so far.

        with Unfinished("patch.unfinished") as work:
            work.begin("patch", {"epochs": 2, ...})     # refuses what another run left there
            ...                                         # work.journal, work.path(...)

    It is gone after the block, unless the run was interrupted or failed at something that can be mended
    (a full disk, say). A process that is killed leaves it, too.

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
        self._begun = self._has_done = False
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
            if self._restart or not file.exists():
                self._refuse_strangers()
                _empty(self.folder)
                _write_whole(file, json.dumps(run, indent=1).encode())
            else:
                self._compare(_read_run(file), run)
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
        """Where a file of the work stands."""
        return self.folder / name

    def write(self, name: str, content: bytes) -> None:
        """Replace a file, whole or not at all."""
        _write_whole(self.folder / name, content)
        self._note_done()

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
                "name for the output, or begin anew with --restart"
            )
        others = _differences("environment", then.get("environment"), now["environment"])
        if others and self._warn is not None:
            self._warn(
                f"going on with work that was begun elsewhere ({'; '.join(others)}): the result can differ "
                "in its last bits from that of an undisturbed run"
            )

    def _refuse_strangers(self) -> None:
        """Nothing is deleted that may be somebody's own."""
        if not (self.folder / _RUN).exists() and any(
            path.name != f"{_RUN}.tmp" for path in self.folder.iterdir()
        ):
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
        finished = fault is None or isinstance(fault, _FINAL) or not self._has_done
        if self._begun and fault is not None and not finished:
            fault.add_note(
                f"what is done so far is kept in {self.folder}: the same command goes on from there"
            )
        with self._stack:
            if self._begun and finished:
                shutil.rmtree(self.folder, ignore_errors=True)


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
            if self._warn is not None:
                self._warn(
                    f"what is done can no longer be kept ({fault.strerror or fault}): if this run is "
                    "interrupted, it begins anew from here"
                )

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
    return out.with_name(out.name + SUFFIX)


def _read_run(file: Path) -> dict[str, Any]:
    try:
        run = json.loads(file.read_bytes())
    except ValueError as fault:
        raise InputError(f"{file} is damaged ({fault}); begin anew with --restart") from None
    return run if isinstance(run, dict) else {}


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


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_whole(path: Path, content: bytes) -> None:
    """Under a temporary name, onto the disk, and into place."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
