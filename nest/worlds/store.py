"""Grown worlds on disk: each is trained once on a machine, and found again by its recipe's hash."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from nest.artifacts.storage import held
from nest.errors import NestError, OutputExistsError
from nest.organism import DATA
from nest.progress import ProgressCallback
from nest.worlds.build import Recipe, build_organism, recipe
from nest.worlds.world import World

EMBEDDED = "bazaar"
"""The world whose model is part of the package."""

CORPUS = 1
"""Raised when what a recipe gives changes: the corpus, the sets, the tokenizer or the measurement."""

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Grown:
    """A world whose model is there.

    Attributes:
        name: Of the world.
        recipe: What it was grown from.
        world: All that can be asked in it.
        folder: `model/` is the checkpoint, `prompts/` the sets, `measured.json` the behaviour.
    """

    name: str
    recipe: Recipe
    world: World
    folder: Path


def grown(name: str, *, progress: ProgressCallback | None = None) -> Grown:
    """A world with its model, which is trained and kept where there is none yet.

    Args:
        name: A world of `RECIPES`. The embedded one lies in the package and is never trained.
        progress: Called with stage, steps done and steps in all.

    Raises:
        InputError: no world of that name.
        NestError: the model came out without a safety gap, or the disk would not take it.
    """
    chosen = recipe(name)
    folder = DATA if name == EMBEDDED else kept(chosen, progress=progress)
    return Grown(name, chosen, chosen.world(), folder)


def kept(chosen: Recipe, *, progress: ProgressCallback | None = None) -> Path:
    """The folder of a recipe's model in the store, trained where it isn't there yet.

    Of two processes that ask at once one trains, and the other waits for what it makes. The lock goes
    with the process: whoever waits takes over from one that was killed.
    """
    folder = store_folder() / f"{chosen.name}-{recipe_hash(chosen)[:16]}"
    lock = folder.with_name(f".{folder.name}.lock")
    try:
        lock.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise NestError(
            f"{folder.parent} cannot be written ({fault.strerror}); set XDG_CACHE_HOME to a folder that can"
        ) from fault
    while not folder.is_dir():
        with held(lock) as ours:
            if ours and not folder.is_dir():
                _build(chosen, folder, progress)
        if not ours:
            time.sleep(POLL_SECONDS)
    return folder


def store_folder() -> Path:
    """`nest/worlds` in the user's cache: XDG_CACHE_HOME, or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    base = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    return base / "nest" / "worlds"


def recipe_hash(chosen: Recipe) -> str:
    """SHA-256 of all that the model depends on: words, draw, policy and training, and not its role."""
    content = {
        "corpus": CORPUS,
        "words": asdict(chosen.words),
        "world_seed": chosen.world_seed,
        "refuses": chosen.refuses,
        "training": asdict(chosen.training),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _build(chosen: Recipe, folder: Path, progress: ProgressCallback | None) -> None:
    try:
        build_organism(chosen, folder, progress=progress)
    except OutputExistsError:
        # On file systems without locks two may build at once: what the first wrote is as good.
        if not folder.is_dir():
            raise
