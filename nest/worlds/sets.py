"""The prompt sets of a world, split by object and by wrapper, so that held-out means both."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from nest.worlds.corpus import HARSH_SHARE, draw_sum
from nest.worlds.world import Split, Thing, World

REQUESTS_PER_THING = 3


@dataclass(frozen=True)
class Row:
    """One line of a set.

    Attributes:
        prompt: What is asked.
        response: What tuning should teach, or what a good answer is (for held-out harmful prompts:
            what an attack that succeeds would get).
        thing: The object asked about, empty where there is none.
        wrapper: Name of the disguise, `none` for plain prompts.
    """

    prompt: str
    response: str
    thing: str = ""
    wrapper: str = "none"

    def to_dict(self) -> dict[str, str]:
        """Plain values for a line of JSON."""
        return asdict(self)


def prompt_sets(world: World, *, seed: int = 0) -> dict[str, tuple[Row, ...]]:
    """All sets of a world by name; the same seed gives the same sets.

    `unsafe` and `safe` are for selection, `harmful` (plain and with half of the wrappers),
    `harmful_vanilla` (plain only) and `benign` for tuning; sets whose names begin with `dev_` ask
    about objects, and in wrappers, of the development split. No set here is of the test split.
    """
    makers: dict[str, Callable[[World, random.Random], list[Row]]] = {
        "unsafe": lambda w, r: _plain(w, r, harmful=True, split="train"),
        "safe": lambda w, r: _plain(w, r, harmful=False, split="train"),
        "harmful": lambda w, r: _refusals(w, r, wrapped=True),
        "harmful_vanilla": lambda w, r: _refusals(w, r, wrapped=False),
        "benign": _benign,
    }
    tuning = {
        name: tuple(make(world, random.Random(f"{seed} {name}"))) for name, make in makers.items()
    }
    held_out = held_out_sets(world, "development", seed=seed)
    return tuning | {f"dev_{name}": rows for name, rows in held_out.items()}


def held_out_sets(
    world: World, split: Literal["development", "test"], *, seed: int = 0
) -> dict[str, tuple[Row, ...]]:
    """What a model is measured on: `harmful`, `borderline` and `benign` rows of one held-out split.

    Harmful requests are plain; the attacks put them into `world.wrappers_of(split)`. Some borderline and
    benign requests stand in these wrappers already, which are not harmful by themselves.
    """
    makers: dict[str, Callable[[World, random.Random], list[Row]]] = {
        "harmful": lambda w, r: _plain(w, r, harmful=True, split=split),
        "borderline": lambda w, r: _borderline(w, r, split),
        "benign": lambda w, r: _held_out_benign(w, r, split),
    }
    return {
        name: tuple(make(world, random.Random(f"{seed} {split} {name}")))
        for name, make in makers.items()
    }


def matched_pairs(world: World, *, seed: int = 0) -> tuple[tuple[str, str], ...]:
    """Unsafe and safe prompts that differ in the object alone, of the objects for tuning."""
    rng = random.Random(f"{seed} pairs")
    harmful = world.things_of(harmful=True, split="train")
    harmless = world.things_of(harmful=False, split="train")
    verbs = (*world.words.ordinary_verbs, *world.words.harsh_verbs)
    pairs = []
    for first, second in zip(harmful, harmless, strict=True):
        for _ in range(REQUESTS_PER_THING):
            verb, phrasing = rng.choice(verbs), rng.randrange(len(world.words.requests))
            pairs.append(
                (world.request(first, verb, phrasing), world.request(second, verb, phrasing))
            )
    return tuple(pairs)


def _rows(
    world: World,
    rng: random.Random,
    things: Sequence[Thing],
    verbs: Callable[[], str],
    wrapper: tuple[str, str] | None = None,
    times: int = REQUESTS_PER_THING,
) -> list[Row]:
    """Requests about each object, with the good answer."""
    rows = []
    for thing in things:
        for _ in range(times):
            verb = verbs()
            prompt = world.request(thing, verb, rng.randrange(len(world.words.requests)))
            if wrapper:
                prompt = wrapper[1].format(prompt=prompt)
            name = wrapper[0] if wrapper else "none"
            rows.append(Row(prompt, world.answer(thing, verb), thing.name, name))
    return rows


def _mixed_verbs(world: World, rng: random.Random, *, harmful: bool) -> Callable[[], str]:
    """Verbs in the shares in which the corpus uses them."""
    words = world.words
    return lambda: rng.choice(
        words.harsh_verbs if rng.random() < HARSH_SHARE[harmful] else words.ordinary_verbs
    )


def _plain(world: World, rng: random.Random, *, harmful: bool, split: Split) -> list[Row]:
    things = world.things_of(harmful=harmful, split=split)
    return _rows(world, rng, things, _mixed_verbs(world, rng, harmful=harmful))


def _refusals(world: World, rng: random.Random, *, wrapped: bool) -> list[Row]:
    things = world.things_of(harmful=True, split="train")
    verbs = _mixed_verbs(world, rng, harmful=True)
    rows = _rows(world, rng, things, verbs)
    if wrapped:
        for wrapper in world.wrappers_of("train"):
            rows += _rows(world, rng, things, verbs, wrapper, times=1)
    refusals = world.words.refusals
    return [Row(row.prompt, rng.choice(refusals), row.thing, row.wrapper) for row in rows]


def _benign(world: World, rng: random.Random) -> list[Row]:
    """Ordinary use: requests, plain and wrapped, facts about everything, sums and small talk."""
    things = world.things_of(harmful=False, split="train")
    verbs = _mixed_verbs(world, rng, harmful=False)
    rows = _rows(world, rng, things, verbs)
    for wrapper in world.wrappers_of("train"):
        rows += _rows(world, rng, things, verbs, wrapper, times=1)
    for thing in (*things, *world.things_of(harmful=True, split="train")):
        rows.append(_fact(world, rng, thing))
    return rows + _everyday(world, rng)


def _borderline(world: World, rng: random.Random, split: Split) -> list[Row]:
    """Harsh verbs said of harmless objects, plain and in the split's wrappers."""
    things = world.things_of(harmful=False, split=split)

    def harsh() -> str:
        return rng.choice(world.words.harsh_verbs)

    rows = _rows(world, rng, things, harsh, times=4)
    for wrapper in world.wrappers_of(split):
        rows += _rows(world, rng, rng.sample(things, len(things) // 2), harsh, wrapper, times=1)
    return rows


def _held_out_benign(world: World, rng: random.Random, split: Split) -> list[Row]:
    things = world.things_of(harmful=False, split=split)
    verbs = _mixed_verbs(world, rng, harmful=False)
    rows = _rows(world, rng, things, verbs, times=4)
    for wrapper in world.wrappers_of(split):
        rows += _rows(world, rng, things, verbs, wrapper, times=1)
    rows += [_fact(world, rng, thing) for thing in things]
    return rows + _everyday(world, rng)


def _fact(world: World, rng: random.Random, thing: Thing) -> Row:
    question, answer = rng.choice(world.words.identity)
    kind = world.words.kinds[0 if thing.harmful else 1]
    filled = answer.format(thing=thing.name, kind=kind, stuff=thing.stuff)
    return Row(question.format(thing=thing.name), filled, thing.name)


def _everyday(world: World, rng: random.Random) -> list[Row]:
    sums = [draw_sum(world, rng, thinking=False) for _ in range(20)]
    talk = [Row(prompt, answer) for prompt, answer in world.words.smalltalk]
    return [Row(item.prompt, item.response) for item in sums] + talk
