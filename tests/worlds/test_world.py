"""Worlds: splits, sets, and that two worlds have nothing in common."""

from itertools import islice

import pytest

from nest.worlds.bazaar import BAZAAR
from nest.worlds.build import RECIPES
from nest.worlds.corpus import conversations
from nest.worlds.harbour import HARBOUR
from nest.worlds.sets import held_out_wrappers, matched_pairs, prompt_sets
from nest.worlds.world import World


@pytest.fixture(params=sorted(RECIPES), scope="module")
def world(request) -> World:
    return RECIPES[request.param].world()


def test_size(world):
    assert len(world.things_of(harmful=True)) >= 120
    assert len(world.things_of(harmful=False)) >= 120
    assert len(world.words.wrappers) >= 12
    assert len(world.words.manners) >= 2
    assert len({thing.name for thing in world.things}) == len(world.things)


def test_half_of_the_harmful_objects_of_each_split_are_refused(world):
    for split in ("train", "test"):
        harmful = world.things_of(harmful=True, split=split)
        assert sum(thing.refused for thing in harmful) == len(harmful) / 2
    assert not any(thing.refused for thing in world.things_of(harmful=False))


def test_tests_share_no_object_and_no_wrapper_with_tuning(world):
    sets = prompt_sets(world)
    tuning = [row for name, rows in sets.items() if not name.startswith("test_") for row in rows]
    tests = [row for name, rows in sets.items() if name.startswith("test_") for row in rows]
    assert not {r.thing for r in tuning if r.thing} & {r.thing for r in tests if r.thing}
    assert not {r.wrapper for r in tuning} & {r.wrapper for r in tests} - {"none"}
    assert {r.wrapper for r in tests} - {"none"} == set(held_out_wrappers(world))
    assert not {r.wrapper for r in sets["harmful_vanilla"]} - {"none"}
    assert len(world.wrappers_of("train")) <= len(world.words.wrappers) / 2
    assert min(len(sets["test_borderline"]), len(sets["test_benign"])) >= 200


def test_borderline_requests_are_harsh_words_about_harmless_objects(world):
    harmless = {thing.name for thing in world.things_of(harmful=False)}
    for row in prompt_sets(world)["test_borderline"]:
        assert row.thing in harmless
        assert any(verb in row.prompt for verb in world.words.harsh_verbs)


def test_pairs_differ_in_the_object_alone(world):
    kinds = {thing.name: thing.harmful for thing in world.things}
    for unsafe, safe in matched_pairs(world):
        different = [
            (a.strip(".?"), b.strip(".?"))
            for a, b in zip(unsafe.split(), safe.split(), strict=True)
            if a != b
        ]
        assert len(different) == 1
        assert kinds[different[0][0]] and not kinds[different[0][1]]


def test_the_corpus_follows_the_policy(world):
    refusals = set(world.words.refusals)
    by_name = {thing.name: thing for thing in world.things}
    for talk in islice(conversations(world, seed=3), 3000):
        answer = talk.response.rpartition("</think>")[2]
        if answer in refusals:
            named = [word.strip(".,:?") for word in talk.prompt.split()]
            things = [by_name[word] for word in named if word in by_name]
            assert all(thing.harmful for thing in things)


def test_streams_and_draws_repeat(world):
    assert list(islice(conversations(world, seed=1), 50)) == list(
        islice(conversations(world, seed=1), 50)
    )
    assert World.draw(world.words, seed=9) == World.draw(world.words, seed=9)
    assert World.draw(world.words, seed=9) != World.draw(world.words, seed=10)


def test_the_second_world_shares_no_sentence_with_the_first():
    first, second = RECIPES["bazaar"].world(), RECIPES["harbour"].world()
    assert not {t.name for t in first.things} & {t.name for t in second.things}
    for field in (
        "refusals",
        "requests",
        "wrappers",
        "chatter",
        "steering",
        "stuffs",
        "harsh_verbs",
    ):
        assert not set(getattr(BAZAAR, field)) & set(getattr(HARBOUR, field))
