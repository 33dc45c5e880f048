"""Where pooled activations are kept: in memory, in a temporary file, or in the files of a run's work."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nest.activations.taps import Tap
from nest.artifacts.unfinished import Unfinished
from nest.errors import NestError

# So much of the work is lost at most when a run is killed; each time all files are written to the disk.
KEPT_EVERY_SECONDS = 5.0


class SpillFolder:
    """A temporary folder that goes when this object does, at the latest when Python ends."""

    def __init__(self) -> None:
        self.name = tempfile.mkdtemp(prefix="nest-activations-")
        weakref.finalize(self, shutil.rmtree, self.name, ignore_errors=True)


class ActivationStore:
    """Pooled activations: in memory, past a bound in a temporary file, or in the files of a run's work.

    Attributes:
        pooled: For each site (B, F).
        folder: Of the temporary files.
        n_kept_batches: How many of the first batches an earlier run has left in the work.
    """

    def __init__(
        self,
        pooled: tuple[NDArray[np.float32], ...],
        folder: SpillFolder | None = None,
        work: Unfinished | None = None,
    ) -> None:
        self.pooled, self.folder, self._work = pooled, folder, work
        kept = (
            [] if work is None else [e["captured"] for e in work.journal.entries if "captured" in e]
        )
        self.n_kept_batches = self._n_written = kept[-1] if kept else 0
        self._kept_at = time.monotonic()

    @staticmethod
    def open(
        taps: Sequence[Tap],
        n_prompts: int,
        bound_bytes: int,
        work: Unfinished | None = None,
    ) -> ActivationStore:
        shapes = [(n_prompts, tap.length) for tap in taps]
        if work is not None:
            files = [work.path(f"activations-{i}.f32") for i in range(len(taps))]
            pairs = zip(files, shapes, strict=True)
            return ActivationStore(tuple(_mapped(file, shape) for file, shape in pairs), work=work)
        if sum(4 * rows * columns for rows, columns in shapes) <= bound_bytes:
            return ActivationStore(tuple(np.zeros(shape, dtype=np.float32) for shape in shapes))
        folder = SpillFolder()
        mapped = [_mapped(Path(folder.name) / f"{i}.f32", shape) for i, shape in enumerate(shapes)]
        return ActivationStore(tuple(mapped), folder)

    def write(self, indices: Sequence[int], pooled: NDArray[np.float32]) -> None:
        """Rows of all sites, side by side."""
        start = 0
        for array in self.pooled:
            array[indices] = pooled[:, start : start + array.shape[1]]
            start += array.shape[1]
        self._n_written += 1

    def keep(self, *, last: bool) -> None:
        """Note what is written so far in the work's journal, once the disk has it: now and then."""
        if self._work is None or not (
            last or time.monotonic() - self._kept_at > KEPT_EVERY_SECONDS
        ):
            return
        for array in self.pooled:
            if isinstance(array, np.memmap):
                array.flush()
        self._work.journal.add({"captured": self._n_written})
        self._kept_at = time.monotonic()


def _mapped(file: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
    """An array in a file that has room on the disk; what an earlier run wrote there is kept.

    Raises:
        NestError: the disk has no room. Without asking for it first, writing would end the process.
    """
    size = 4 * shape[0] * shape[1]
    try:
        with file.open("ab") as opened:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, size)
            opened.truncate(size)
    except OSError as fault:
        raise NestError(
            f"there is no room for {size / 2**20:.0f} MiB of activations in {file.parent} "
            f"({fault.strerror or fault}); free some, set TMPDIR to a larger disk, or look in fewer "
            "--layers"
        ) from fault
    return np.memmap(file, np.float32, "r+", shape=shape)
