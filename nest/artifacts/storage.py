"""Folders written whole or not at all, and read without trust."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nest.errors import (
    InputError,
    MissingInputError,
    NestError,
    OutputExistsError,
    PatchError,
    SelectionError,
)

MANIFEST = "manifest.json"
SUPPORTED_MAJOR = 1
MAX_MANIFEST_BYTES = 256 * 1024**2
"""A manifest lists sites, not weights: 256 MiB is far more than any model's."""

CHECKPOINT = "checkpoint"
"""The kind of a folder that is a transformers checkpoint and has no manifest."""

SEAL = "sha256"
"""The manifest's entry that holds the hash of all its others."""

_SEALED_SINCE = {"selection": (1, 1), "patch": (1, 2), "comparison": (1, 1)}
"""From which format version on a manifest is sealed, and hashes the files beside it."""

_FAULTS: dict[str, type[NestError]] = {"selection": SelectionError, "patch": PatchError}


# --- writing -------------------------------------------------------------------------------------


@contextmanager
def new_folder(
    folder: str | Path, *, kind: str, overwrite: bool = False, sources: Sequence[Path] = ()
) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well.

    Whatever ends the block early, Ctrl-C and a full disk included, removes the temporary folder and
    leaves an older `folder` as it was. What a killed process could not remove, the next that writes the
    same folder does.

    Args:
        folder: The name to take. Parents are made.
        kind: What will be in it: `selection`, `patch`, `checkpoint` or another manifest's kind.
        overwrite: Replace an older folder of the same kind, once the new one is complete.
        sources: Folders that are read meanwhile; `folder` may not be one of them, nor inside or
            around one.

    Yields:
        The temporary folder, empty.

    Raises:
        OutputExistsError: something is there, and is not to be overwritten or is of another kind.
        InputError: `folder` and a source overlap.
        NestError: the disk would not take it.
    """
    target = Path(folder).expanduser().resolve()
    check_output(target, kind=kind, overwrite=overwrite, sources=sources)
    made = [parent for parent in target.parents if not parent.exists()]
    temporary: Path | None = None
    try:
        with ExitStack() as stack:
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep(target)
            while temporary is None:
                temporary = _claimed(target, stack)
            yield temporary
            _move_into_place(temporary, target, overwrite=overwrite)
    except BaseException as fault:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:  # innermost first
            with suppress(OSError):
                parent.rmdir()
        if isinstance(fault, OSError) and not isinstance(fault, NestError):
            raise NestError(
                f"{target} could not be written: {fault.strerror or fault} "
                f"({fault.filename or target.parent}); nothing was left there"
            ) from fault
        raise


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a folder for the time of the block, so that other processes see that it is in use.

    The lock is the system's, on the folder itself: it goes with the process, however that ends.

    Yields:
        Whether no other process holds it; always true where the system has no such locks.
    """
    opened = _opened(folder)
    if opened is None:
        yield True
        return
    try:
        yield _locked(opened) is not False  # where there are no locks nobody can be seen to hold it
    finally:
        os.close(opened)


@contextmanager
def in_turn(descriptor: int, *, alone: bool) -> Iterator[None]:
    """Hold an open file for the time of the block, waiting for other processes that do.

    Args:
        descriptor: Of the file; it goes on without a lock where the system or the file's has none.
        alone: To write; otherwise others may read at the same time.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def _opened(folder: Path) -> int | None:
    """A descriptor to lock; None on Windows, which opens no folders."""
    try:
        import fcntl  # noqa: F401 - only whether there is such a module
    except ImportError:
        return None
    try:
        return os.open(folder, os.O_RDONLY)
    except OSError:
        return None


def _locked(opened: int) -> bool | None:
    """Whether the lock was had; None on a file system that has none."""
    import fcntl

    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _claimed(target: Path, stack: ExitStack) -> Path | None:
    """A new temporary folder, held; None where another process has swept it in between."""
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    ours = stack.enter_context(held(temporary))
    return temporary if ours and temporary.is_dir() else None


def _sweep(target: Path) -> None:
    """Remove temporary folders of this target that no process holds any more."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}.????????.tmp"):
        opened = _opened(folder)
        if opened is None:
            continue
        try:
            if _locked(opened):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(opened)


def check_output(
    folder: str | Path, *, kind: str, overwrite: bool = False, sources: Sequence[Path] = ()
) -> None:
    """Refuse an output folder before any work is done for it.

    Raises:
        OutputExistsError: something is there, and is not to be overwritten or is of another kind.
        InputError: the folder and a source overlap.
    """
    target = Path(folder).expanduser().resolve()
    for source in (Path(source).expanduser().resolve() for source in sources):
        if target == source or source in target.parents or target in source.parents:
            raise InputError(
                f"the output {target} and the input {source} overlap; choose an output folder "
                "beside it"
            )
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputExistsError(f"{target} is a file; choose a folder's name for the output")
    if not overwrite:
        raise OutputExistsError(
            f"{target} exists already; choose another name, or overwrite it (--overwrite)"
        )
    found = _kind_of(target)
    if found not in (kind, "empty"):
        raise OutputExistsError(
            f"{target} is not overwritten: it holds {found}, not a {kind}; choose another name, or "
            "delete it yourself"
        )


def write_artifact(
    folder: str | Path,
    *,
    kind: str,
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    files: Mapping[str, str | bytes] | None = None,
    hashed: Sequence[str] = (),
    overwrite: bool = False,
) -> None:
    """Write an artifact: its manifest, safetensors files and others, all or nothing.

    Args:
        folder: Takes this name once complete.
        kind: Written into the manifest.
        manifest: Plain values; must hold `format_version`.
        tensors: For each file name its tensors.
        files: Other files by relative path, such as a README.
        hashed: Which of them are sealed as well; what people may edit is not.
        overwrite: Replace an older artifact of the same kind.

    Raises:
        OutputExistsError: see `new_folder`.
        NestError: the disk would not take it.
    """
    from safetensors.torch import save

    assert "format_version" in manifest, "every manifest says its format's version"
    payloads: dict[str, bytes] = {}
    for name, entries in tensors.items():
        ready = {key: value.detach().cpu().contiguous() for key, value in entries.items()}
        payloads[name] = save(ready, metadata={"format": "pt"})
    # a name from a command line can hold bytes that are no text
    extras = {
        name: extra.encode("utf-8", "backslashreplace") if isinstance(extra, str) else extra
        for name, extra in (files or {}).items()
    }
    sealed = {**payloads, **{name: extras[name] for name in hashed}}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in sealed.items()}
    text = _as_json({"kind": kind, **manifest, "files": hashes})
    text = _as_json({**json.loads(text), SEAL: seal_of(json.loads(text))})
    with new_folder(folder, kind=kind, overwrite=overwrite) as temporary:
        for name, content in {**payloads, **extras}.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (temporary / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _as_json(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, allow_nan=False, default=_plain)


def seal_of(manifest: Mapping[str, Any]) -> str:
    """sha256 of all entries of a manifest but the seal itself, however they are spaced and ordered."""
    content = {name: value for name, value in manifest.items() if name != SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """What JSON does not know: paths, tuples of dataclasses and numpy's numbers."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a manifest cannot hold a {type(value).__name__}")


def _move_into_place(temporary: Path, target: Path, *, overwrite: bool) -> None:
    """Give the finished folder its name; an older one is gone only once the new one is there."""
    if not target.exists():
        temporary.rename(target)
        return
    if not overwrite:
        raise OutputExistsError(f"{target} was made by someone else meanwhile; choose another name")
    old = target.parent / f".{target.name}.{secrets.token_hex(4)}.old"
    try:
        target.rename(old)
        temporary.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _kind_of(folder: Path) -> str:
    """What a folder holds: a manifest's kind, `checkpoint`, `empty`, or a phrase."""
    if not any(folder.iterdir()):
        return "empty"
    manifest = folder / MANIFEST
    if manifest.is_file() and manifest.stat().st_size <= MAX_MANIFEST_BYTES:
        with suppress(ValueError, RecursionError, OSError):
            content = json.loads(manifest.read_bytes())
            if isinstance(content, dict) and isinstance(content.get("kind"), str):
                return str(content["kind"])
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return CHECKPOINT
    return "other files"


# --- reading -------------------------------------------------------------------------------------


def read_manifest(folder: str | Path, *, kind: str) -> dict[str, Any]:
    """The manifest of an artifact, once it is known to be of this kind and of a version we read.

    Raises:
        MissingInputError: no such folder, or no manifest in it.
        SelectionError, PatchError: by kind: not JSON, of another kind, or of an unknown version.
    """
    path, fault = Path(folder) / MANIFEST, _fault(kind)
    if not Path(folder).is_dir():
        raise MissingInputError(f"there is no folder {folder}; expected a {kind} written by nest")
    if not path.is_file():
        raise MissingInputError(f"{folder} has no {MANIFEST}; expected a {kind} written by nest")
    size = path.stat().st_size
    if size > MAX_MANIFEST_BYTES:
        raise fault(f"{path} has {size} bytes, more than any {kind} needs; it is not read")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as cause:
        raise fault(f"{path} is damaged: {cause}; write the {kind} again") from None
    if not isinstance(content, dict) or not isinstance(content.get("kind"), str):
        raise fault(f"{path} does not say what it is; expected a {kind} written by nest")
    if content["kind"] != kind:
        raise fault(f"{folder} is a {content['kind'][:40]}; expected a {kind}")
    version = str(content.get("format_version"))
    major = version.partition(".")[0]
    if major != str(SUPPORTED_MAJOR):
        raise fault(
            f"{folder} has format version {version[:20]}; this nest reads {SUPPORTED_MAJOR}.x. "
            "Read it with the version of nest that wrote it"
        )
    return content


def check_sealed(
    folder: str | Path,
    manifest: Mapping[str, Any],
    payload: str,
    *,
    kind: str,
    others: bool = True,
    mend: str | None = None,
) -> None:
    """Refuse an artifact of which a bit is not as it was written; called when all of it is read.

    Artifacts of before there were seals are taken as they are.

    Args:
        folder: The artifact.
        manifest: Its manifest.
        payload: The file beside it that must be hashed.
        kind: Decides the error's class.
        others: Look at all other files that are hashed, too.
        mend: Ends the sentence; by default to fetch it again.

    Raises:
        SelectionError, PatchError, InputError: by kind: the manifest or a file beside it was changed.
    """
    major, _, minor = str(manifest["format_version"]).partition(".")
    version = (int(major), int(minor) if minor.isdecimal() else 0)
    if version < _SEALED_SINCE.get(kind, (0, 0)):
        return
    fault, hashes = _fault(kind), manifest.get("files")
    mend = f"fetch the {kind} again" if mend is None else mend
    sealed = isinstance(hashes, dict) and payload in hashes
    if not sealed or manifest.get(SEAL) != seal_of(manifest):
        raise fault(
            f"{Path(folder) / MANIFEST} is not as it was written: it is damaged, or was edited; {mend}"
        )
    for name, expected in dict(hashes or {}).items():
        if not others and name != payload:
            continue
        file = Path(folder) / Path(name).name
        found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
        if found != expected:
            raise fault(
                f"{file} is damaged: its bytes are not those that {MANIFEST} has the hash of; {mend}"
            )


def read_tensors(
    file: str | Path, expected: Mapping[str, tuple[int, ...]], *, kind: str
) -> dict[str, Tensor]:
    """Exactly the expected tensors of a safetensors file, on the CPU.

    Args:
        file: The file; its header is checked before any tensor is read.
        expected: For each name the shape; -1 stands for any length.
        kind: Decides the error's class.

    Raises:
        MissingInputError: no such file.
        SelectionError, PatchError: by kind: damaged or cut short, a tensor missing, unexpected, of
            a wrong shape, or holding NaN or infinity.
    """
    from safetensors import SafetensorError, safe_open

    fault, path = _fault(kind), Path(file)
    if not path.is_file():
        raise MissingInputError(f"{path} is missing; the {kind} is not complete, write it again")
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as reader:
            names = set(reader.keys())
            missing, extra = sorted(set(expected) - names), sorted(names - set(expected))
            if missing:
                raise fault(f"{path} lacks the tensor {missing[0]!r}; write the {kind} again")
            if extra:
                raise fault(
                    f"{path} holds an unexpected tensor {extra[0]!r}; write the {kind} again"
                )
            for name, shape in expected.items():
                found = tuple(reader.get_slice(name).get_shape())
                if not _fits(found, shape):
                    raise fault(f"{path}: tensor {name!r} has shape {found}; expected {shape}")
                tensors[name] = reader.get_tensor(name)
    except (SafetensorError, OSError) as cause:
        raise fault(f"{path} is damaged or cut short ({cause}); write the {kind} again") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise fault(f"{path}: tensor {name!r} holds NaN or infinity; write the {kind} again")
    return tensors


def _fits(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(found) == len(shape) and all(
        want in (-1, got) for got, want in zip(found, shape, strict=True)
    )


def _fault(kind: str) -> type[NestError]:
    return _FAULTS.get(kind, InputError)
