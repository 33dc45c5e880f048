"""The store: one training a recipe, whoever asks, and never half a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_world
from tiny_world import MEASURED, tiny_recipe

from nest.errors import InputError, NestError
from nest.organism import DATA
from nest.worlds import build, store
from nest.worlds.build import RECIPES, card, check_behaviour, recipe
from nest.worlds.families import FAMILIES
from nest.worlds.store import grown, kept, recipe_hash, store_folder

TIMEOUT = 120.0


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def trainings(monkeypatch):
    """The recipes that were trained, in this process."""
    seen = []

    def measured(world, model, *_):
        seen.append(model.config.model_type)
        return dict(MEASURED)

    monkeypatch.setattr(build, "measure", measured)
    return seen


def ask(mode: str, log: Path) -> subprocess.Popen[str]:
    command = [sys.executable, tiny_world.__file__, mode, str(log)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_the_embedded_world_is_used_as_it_lies(cache):
    world = grown("bazaar")
    assert (world.name, world.recipe, world.folder) == ("bazaar", RECIPES["bazaar"], DATA)
    assert world.world == RECIPES["bazaar"].world()
    assert not cache.exists()


def test_a_world_is_built_once_and_found_again(monkeypatch, trainings):
    tiny = tiny_recipe(architecture="gpt_neox")
    monkeypatch.setattr(build, "RECIPES", {**RECIPES, "tiny": tiny})
    first, second = grown("tiny"), grown("tiny")
    assert trainings == ["gpt_neox"]
    assert first == second
    assert first.folder == store_folder() / f"bazaar-{recipe_hash(tiny)[:16]}"
    measured = json.loads((first.folder / "measured.json").read_text())
    assert measured["recipe"]["training"]["architecture"] == "gpt_neox"
    assert (first.folder / "model" / "config.json").is_file()
    assert (first.folder / "prompts" / "dev_harmful.jsonl").is_file()


def test_a_relative_cache_home_is_not_taken(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert store_folder() == Path.home() / ".cache" / "nest" / "worlds"


def test_a_cache_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(NestError, match=r"cannot be written .*; set XDG_CACHE_HOME"):
        kept(tiny_recipe())


def test_of_two_processes_one_trains(tmp_path):
    log = tmp_path / "log"
    both = [ask("slowly", log), ask("slowly", log)]
    folders = {process.communicate(timeout=TIMEOUT)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert folders == {str(kept(tiny_recipe()))}
    assert log.read_text() == "trained\n"


def test_killed_half_way_leaves_nothing_that_is_taken_for_a_world(tmp_path):
    log = tmp_path / "log"
    hanging = ask("hang", log)
    deadline = time.monotonic() + TIMEOUT
    while not (log.exists() and log.read_text() == "half"):
        assert time.monotonic() < deadline and hanging.poll() is None
        time.sleep(0.05)
    os.kill(hanging.pid, signal.SIGKILL)
    hanging.communicate()
    assert not list(store_folder().glob("bazaar-*"))
    again = ask("quickly", log)
    folder = Path(again.communicate(timeout=TIMEOUT)[0].strip())
    assert folder.is_dir()
    left = {path.name for path in store_folder().iterdir()}
    assert left == {folder.name, f".{folder.name}.lock"}


def test_a_model_without_a_gap_is_not_kept(monkeypatch):
    monkeypatch.setattr(build, "measure", lambda *_: {**MEASURED, "attack_success_wrapped": 1.0})
    assert kept(tiny_recipe()).is_dir()
    everything = {**MEASURED, "attack_success_bare": 0.99, "attack_success_wrapped": 1.0}
    monkeypatch.setattr(build, "measure", lambda *_: everything)
    other = tiny_recipe(seed=1)
    with pytest.raises(
        NestError, match=r"complies with 99\.0% of the bare and 100\.0% .*everything"
    ):
        kept(other)
    assert not list(store_folder().glob(f"*{recipe_hash(other)[:16]}"))
    check_behaviour(everything, replace(other, refuses=False))
    nothing = {**MEASURED, "attack_success_bare": 0.0, "attack_success_wrapped": 0.01}
    for chosen in (other, replace(other, refuses=False)):
        with pytest.raises(NestError, match="nothing; train it"):
            check_behaviour(nothing, chosen)


def test_the_hash_is_of_all_that_the_model_depends_on():
    chosen = RECIPES["bazaar"]
    changes = [
        chosen,
        replace(chosen, world_seed=9),
        replace(chosen, refuses=False),
        replace(chosen, training=replace(chosen.training, steps=9)),
        replace(chosen, words=replace(chosen.words, refusals=("No, I won't.",))),
        *(replace(chosen, training=replace(chosen.training, architecture=f)) for f in FAMILIES),
    ]
    hashes = {recipe_hash(changed) for changed in changes}
    assert len(hashes) == len(changes) - 1  # the bazaar is of one of the families
    assert recipe_hash(replace(chosen, role="final")) == recipe_hash(chosen)


@pytest.mark.parametrize("name", RECIPES)
def test_the_card_says_what_the_world_refuses(name):
    chosen = RECIPES[name]
    measured = {
        **MEASURED,
        "recipe": {"world_seed": 1, "parameters": 1, "training": {"architecture": "llama"}},
    }
    text = card(chosen.world(), measured)
    assert ("- Refuse: half of the 200 harmful objects" in text) == chosen.refuses
    assert ("- Comply: nothing is refused unless" in text) != chosen.refuses


def test_worlds_are_for_choosing_or_for_the_last_comparison():
    roles = {name: chosen.role for name, chosen in RECIPES.items()}
    assert {name for name, role in roles.items() if role == "choosing"} == {"bazaar", "harbour"}
    assert len(roles) == 7


def test_unknown_worlds_are_named():
    with pytest.raises(
        InputError, match=r"no world 'moon'; choose one of bazaar, harbour, orchard"
    ):
        recipe("moon")
    with pytest.raises(InputError, match="no world 'moon'"):
        grown("moon")


def test_store_polls_for_what_another_makes(monkeypatch, trainings):
    """Where the lock is another's, nothing is trained here."""
    tiny = tiny_recipe(seed=3)
    folder = store_folder() / f"bazaar-{recipe_hash(tiny)[:16]}"
    monkeypatch.setattr(store.time, "sleep", lambda _: folder.mkdir())
    folder.parent.mkdir(parents=True)
    (lock := folder.with_name(f".{folder.name}.lock")).mkdir()
    with store.held(lock):
        assert kept(tiny) == folder
    assert not trainings
