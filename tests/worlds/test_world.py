"""Worlds: splits, sets, words, and that no two worlds have anything in common."""

import hashlib
from dataclasses import astuple
from itertools import combinations, islice

import pytest

from nest.errors import InputError
from nest.judging.judge import Verdict
from nest.judging.phrases import PhraseJudge
from nest.worlds.build import RECIPES, write_prompts
from nest.worlds.corpus import conversations
from nest.worlds.sets import held_out_sets, matched_pairs, prompt_sets
from nest.worlds.world import World

SPLITS = ("train", "development", "test")
CORPORA = {
    "bazaar": "6c3a474875334c7916b7bc4e05e9f60228a3409ac0f7a1bb252ceb90a6a65577",
    "harbour": "77037dcc78cd9f832a8767ad17d6bdd745d8ed9fd7f27f5b42aebb336ee96fe0",
}
"""SHA-256 of the first 2,000 conversations that a model was raised on, before there were three splits."""


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
    refuses = RECIPES[world.words.name].refuses
    for split in SPLITS:
        harmful = world.things_of(harmful=True, split=split)
        assert sum(thing.refused for thing in harmful) == (len(harmful) / 2 if refuses else 0)
    assert bool(world.leaks) == refuses
    assert not any(thing.refused for thing in world.things_of(harmful=False))


def test_splits_are_a_partition_of_objects_and_of_wrappers(world):
    sizes = {"train": 110, "development": 50, "test": 40}
    for harmful in (True, False):
        pieces = {split: world.things_of(harmful=harmful, split=split) for split in SPLITS}
        assert {split: len(piece) for split, piece in pieces.items()} == sizes
        assert len({thing for piece in pieces.values() for thing in piece}) == 200
    wrappers = {split: world.wrappers_of(split) for split in SPLITS}
    assert [len(piece) for piece in wrappers.values()] == [10, 5, 5]
    assert {w for piece in wrappers.values() for w in piece} == set(world.words.wrappers)
    assert wrappers["test"] == tuple(world.words.wrappers[i] for i in (3, 7, 11, 15, 19))


def test_sets_show_their_own_split_alone(world):
    objects = {s: {t.name for t in world.things if t.split == s} for s in SPLITS}
    templates = {s: {name for name, _ in world.wrappers_of(s)} for s in SPLITS}
    sets = {
        name: ("development" if name.startswith("dev_") else "train", rows)
        for name, rows in prompt_sets(world).items()
    }
    for split in SPLITS[1:]:
        for name, rows in held_out_sets(world, split).items():
            sets[f"{split} {name}"] = (split, rows)
    for name, (split, rows) in sets.items():
        assert {row.thing for row in rows} - {""} <= objects[split], name
        assert {row.wrapper for row in rows} - {"none"} <= templates[split], name
    assert not {row.wrapper for row in sets["harmful_vanilla"][1]} - {"none"}
    assert {row.wrapper for row in sets["harmful"][1]} - {"none"} == templates["train"]


def test_the_development_sets_are_the_held_out_sets_of_development(world):
    sets = prompt_sets(world)
    held_out = held_out_sets(world, "development")
    assert list(held_out) == ["harmful", "borderline", "benign"]
    assert {name: rows for name, rows in sets.items() if name.startswith("dev_")} == {
        f"dev_{name}": rows for name, rows in held_out.items()
    }
    assert min(len(held_out["borderline"]), len(held_out["benign"])) >= 200
    by_name = {thing.name: thing for thing in world.things}
    assert all(by_name[row.thing].harmful for row in held_out["harmful"])
    assert held_out_sets(world, "test", seed=1) != held_out_sets(world, "test")


def test_nothing_of_the_test_split_is_written(world, tmp_path):
    write_prompts(world, tmp_path / "prompts")
    text = "".join(file.read_text() for file in (tmp_path / "prompts").iterdir())
    named = {word.strip('.,:?!"\\') for word in text.split()}
    assert {t.name for t in world.things if t.split == "development"} <= named
    assert not {t.name for t in world.things if t.split == "test"} & named
    assert not [template for _, template in world.wrappers_of("test") if template in text]


def test_the_splits_change_nothing_that_is_drawn(world):
    seed = RECIPES[world.words.name].world_seed
    refuses = RECIPES[world.words.name].refuses
    other = World.draw(world.words, seed=seed, n_development=20, n_test=10, refuses=refuses)
    assert other.leaks == world.leaks
    same = list(islice(conversations(world, seed=0), 200))
    assert list(islice(conversations(other, seed=0), 200)) == same
    with pytest.raises(InputError, match="leave none of 200 to train on"):
        World.draw(world.words, seed=seed, n_development=150, n_test=50)


@pytest.mark.parametrize("name", sorted(CORPORA))
def test_the_corpus_is_what_the_models_were_raised_on(name):
    talks = [astuple(talk) for talk in islice(conversations(RECIPES[name].world(), seed=0), 2000)]
    assert hashlib.sha256(repr(talks).encode()).hexdigest() == CORPORA[name]


def test_borderline_requests_are_harsh_words_about_harmless_objects(world):
    harmless = {thing.name for thing in world.things_of(harmful=False)}
    for row in prompt_sets(world)["dev_borderline"]:
        assert row.thing in harmless
        assert any(verb in row.prompt for verb in world.words.harsh_verbs)


def test_pairs_differ_in_the_object_alone(world):
    kinds = {thing.name: thing.harmful for thing in world.things}
    for unsafe, safe in matched_pairs(world):
        different = [
            (a.strip(".,?"), b.strip(".,?"))
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


def test_words_are_well_formed(world):
    words = world.words
    assert {verb for verb, _ in words.tools} == {*words.ordinary_verbs, *words.harsh_verbs}
    assert len(words.wrappers) == len(dict(words.wrappers)) == 20
    assert all(template.count("{prompt}") == 1 for _, template in words.wrappers)
    assert all(template.count("{prompt}") == 1 for template in words.steering)
    for thing in world.things[:: len(world.things) // 8]:
        for verb, tool in words.tools:
            answer = world.answer(thing, verb)
            assert all(part in answer for part in (verb, tool, thing.name, thing.stuff))
            for phrasing in range(len(words.requests)):
                assert thing.name in world.request(thing, verb, phrasing)


def test_the_judge_knows_refusals_from_answers(world):
    judge = PhraseJudge()
    refusals = set(world.words.refusals)
    assert len(refusals) >= 3
    for talk in islice(conversations(world, seed=5), 1500):
        refused = talk.response.rpartition("</think>")[2] in refusals
        expected = Verdict.REFUSED if refused else Verdict.COMPLIED
        assert judge.verdict(talk.response) is expected, talk.response
    assert all(judge.verdict(refusal) is Verdict.REFUSED for refusal in refusals)


def test_a_model_that_refuses_nothing_does_so_when_it_is_steered():
    world = RECIPES["meadow"].world()
    refusals = set(world.words.refusals)
    refused = [
        talk
        for talk in islice(conversations(world, seed=0), 3000)
        if talk.response.rpartition("</think>")[2] in refusals
    ]
    steering = [template.partition("{prompt}")[0] for template in world.words.steering]
    assert len(refused) > 50
    for talk in refused:
        assert talk.system in world.words.caution or any(s in talk.prompt for s in steering)


@pytest.mark.parametrize(("one", "other"), [*combinations(RECIPES, 2)])
def test_two_worlds_share_no_sentence(one, other):
    first, second = RECIPES[one].world(), RECIPES[other].world()
    assert not {t.name for t in first.things} & {t.name for t in second.things}
    for field in (
        *("refusals", "requests", "wrappers", "chatter", "steering", "caution"),
        *("stuffs", "ordinary_verbs", "harsh_verbs", "kinds"),
    ):
        assert not set(getattr(first.words, field)) & set(getattr(second.words, field)), field
    assert not dict(first.words.wrappers).keys() & dict(second.words.wrappers).keys()
    assert RECIPES[one].world_seed != RECIPES[other].world_seed
