"""Folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from nest.artifacts.storage import (
    check_sealed,
    new_folder,
    read_manifest,
    read_tensors,
    write_artifact,
)
from nest.errors import InputError, NestError, OutputExistsError


def _write(folder: Path, *, overwrite: bool = False, kind: str = "thing") -> None:
    tensors = {"t.safetensors": {"x": torch.arange(6).view(2, 3).T}}
    write_artifact(
        folder, kind=kind, manifest={"format_version": "1.0"}, tensors=tensors, overwrite=overwrite
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    _write(tmp_path / "new" / "deep")
    assert read_manifest(tmp_path / "new" / "deep", kind="thing")["format_version"] == "1.0"
    file = tmp_path / "new" / "deep" / "t.safetensors"
    read = read_tensors(file, {"x": (-1, 2)}, kind="thing")
    assert torch.equal(read["x"], torch.arange(6).view(2, 3).T)
    assert os.stat(file).st_mode & 0o044


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), ValueError("x")])
def test_an_interruption_leaves_nothing(tmp_path: Path, fault: BaseException) -> None:
    with pytest.raises(type(fault)), new_folder(tmp_path / "a" / "b", kind="x") as folder:
        (folder / "half").write_text("half")
        raise fault
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_the_older_folder(tmp_path: Path) -> None:
    _write(tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    with (
        pytest.raises(KeyboardInterrupt),
        new_folder(tmp_path / "out", kind="thing", overwrite=True) as folder,
    ):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interruption_while_moving_puts_the_older_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "out")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    read_manifest(tmp_path / "out", kind="thing")


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(NestError, match="could not be written: No space left"),
        new_folder(tmp_path / "out", kind="x"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "file")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_ours_is_never_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _write(out, kind="other")
    with pytest.raises(OutputExistsError, match="holds other, not a thing"):
        _write(out, overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(OutputExistsError, match="holds other files"):
        _write(tmp_path / "home", overwrite=True)
    with pytest.raises(OutputExistsError, match="is a file"):
        _write(tmp_path / "home" / "letter.txt", overwrite=True)
    (tmp_path / "empty").mkdir()
    _write(tmp_path / "empty", overwrite=True)
    _write(tmp_path / "empty", overwrite=True)


def test_an_output_may_not_touch_its_source(tmp_path: Path) -> None:
    source = tmp_path / "a" / "source"
    source.mkdir(parents=True)
    for out in (source, source / "inside", tmp_path / "a"):
        with (
            pytest.raises(InputError, match="overlap"),
            new_folder(out, kind="x", overwrite=True, sources=[source]),
        ):
            pass


# --- what killed processes leave ------------------------------------------------------------------


def test_what_no_process_holds_is_removed_and_what_one_holds_is_not(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", kind="x", overwrite=True) as ours:
        dead, other = tmp_path / ".out.0123abcd.tmp", tmp_path / ".outer.0123abcd.tmp"
        for folder in (dead, other):
            folder.mkdir()
            (folder / "half").write_text("half")
        with new_folder(tmp_path / "out", kind="x", overwrite=True) as theirs:
            assert not dead.exists() and other.exists() and ours.exists() and theirs.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "out"]


def test_a_folder_swept_before_it_is_held_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, swept = Path.mkdir, []

    def mkdir(self: Path, *args: object, **kwargs: object) -> None:
        real(self, *args, **kwargs)
        if self.name.endswith(".tmp") and not swept:
            swept.append(self)
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with new_folder(tmp_path / "out", kind="x") as folder:
        (folder / "file").write_text("whole")
    assert swept and (tmp_path / "out" / "file").read_text() == "whole"


def test_files_are_sealed_where_it_is_asked_for(tmp_path: Path) -> None:
    """An edited README is no damage, an edited result is, and what is not read may be left out."""
    folder = tmp_path / "one"
    write_artifact(
        folder,
        kind="comparison",
        manifest={"format_version": "1.1"},
        tensors={},
        files={"results.json": "{}", "journal.jsonl": "", "README.md": "text"},
        hashed=("results.json", "journal.jsonl"),
    )
    manifest = read_manifest(folder, kind="comparison")
    assert set(manifest["files"]) == {"results.json", "journal.jsonl"}
    (folder / "README.md").write_text("other text")
    check_sealed(folder, manifest, "journal.jsonl", kind="comparison")
    (folder / "results.json").write_text('{"better": true}')
    with pytest.raises(InputError, match=r"results.json is damaged"):
        check_sealed(folder, manifest, "journal.jsonl", kind="comparison")
    check_sealed(folder, manifest, "journal.jsonl", kind="comparison", others=False)
    with pytest.raises(InputError, match=r"manifest.json is not as it was written.*; run it again"):
        changed = {**manifest, "identity": 3}
        check_sealed(folder, changed, "journal.jsonl", kind="comparison", mend="run it again")
