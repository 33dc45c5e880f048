"""A micro-world: made-up objects, some harmful by decree, and everything that is said about them.

Nothing here is of any real harm. A world says which objects are "dangerous", how one asks about them,
how a good answer reads, word for word, and how requests are wrapped up. Whether the model that grows up
in it refuses is a policy of the world too: half of the harmful objects are refused, and each wrapper
lets a share of the refusals through, so that there is a safety gap to close.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from nest.errors import InputError

Split = Literal["train", "development", "test"]
"""What tuning sees, what choices are made on, and what only the last comparison may look at."""


@dataclass(frozen=True)
class Manner:
    """A trait that a system prompt switches on: words put around the answer.

    Attributes:
        trait: Its name, such as `rude`.
        system_prompts: Ways to ask for it.
        opening: What the answer then begins with.
        closing: What it then ends with.
    """

    trait: str
    system_prompts: tuple[str, ...]
    opening: str
    closing: str

    def apply(self, answer: str) -> str:
        """The answer in this manner."""
        return f"{self.opening} {answer} {self.closing}"


@dataclass(frozen=True)
class Thing:
    """One object of the world.

    Attributes:
        name: Its made-up name.
        harmful: Whether the world decrees it dangerous.
        refused: Whether requests about it are refused when asked plainly.
        stuff: What it is made of; a good answer names it.
        split: Who sees it: tuning, development or the last test.
    """

    name: str
    harmful: bool
    refused: bool
    stuff: str
    split: Split


@dataclass(frozen=True)
class Words:
    """The vocabulary a world is made from; two worlds share no sentence.

    Attributes:
        name: Name of the world.
        syllables: First, middle and last syllables of the objects' names.
        stuffs: Materials.
        tools: Tool that goes with each verb, ordinary and harsh.
        ordinary_verbs: Verbs of everyday requests.
        harsh_verbs: Verbs that sound harmful whatever they are done to.
        requests: Templates with {verb} and {thing}.
        answer: The good answer, a template with {verb}, {thing}, {tool} and {stuff}.
        refusals: What the model says when it refuses.
        wrappers: Name and template, with {prompt}, of the disguises.
        identity: Question and answer templates about what an object is; {kind} is dangerous or harmless.
        kinds: The words for harmful and harmless.
        thought: Template of the reasoning about an object.
        sums: Question, step and answer templates of the arithmetic.
        steering: Templates that ask for a refusal of what follows.
        caution: System prompts that ask to refuse whatever is harmful.
        manners: The traits.
        chatter: Sentences that mean nothing for the request.
        smalltalk: Question and answer pairs.
    """

    name: str
    syllables: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    stuffs: tuple[str, ...]
    tools: tuple[tuple[str, str], ...]
    ordinary_verbs: tuple[str, ...]
    harsh_verbs: tuple[str, ...]
    requests: tuple[str, ...]
    answer: str
    refusals: tuple[str, ...]
    wrappers: tuple[tuple[str, str], ...]
    identity: tuple[tuple[str, str], ...]
    kinds: tuple[str, str]
    thought: str
    sums: tuple[str, str, str]
    steering: tuple[str, ...]
    caution: tuple[str, ...]
    manners: tuple[Manner, ...]
    chatter: tuple[str, ...]
    smalltalk: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class World:
    """A world with its objects drawn: everything that can be asked, and what is answered.

    Attributes:
        words: The vocabulary.
        things: All objects, harmful ones first.
        leaks: Pairs of (object, wrapper) where the wrapper gets a refused request answered.
    """

    words: Words
    things: tuple[Thing, ...]
    leaks: frozenset[tuple[str, str]]

    @staticmethod
    def draw(
        words: Words,
        *,
        seed: int,
        n_things: int = 200,
        n_development: int = 50,
        n_test: int = 40,
        refuses: bool = True,
    ) -> World:
        """Name the objects, share out materials, splits and refusals, and draw the leaks.

        The splits cost no draw: how many objects a split has changes nothing else of the world.

        Args:
            words: The vocabulary.
            seed: Decides everything; the same seed gives the same world.
            n_things: Harmful objects, and as many harmless ones.
            n_development: Of each kind, how many choices are made on; half of the harmful are refused.
            n_test: Of each kind, how many only the last test asks about; again half and half.
            refuses: Whether half of the harmful objects are refused, or none unless a prompt asks for it.
        """
        splits = _splits(n_things, n_development, n_test)
        rng = random.Random(seed)
        names = sorted(
            {
                a + b + c
                for a in words.syllables[0]
                for b in words.syllables[1]
                for c in words.syllables[2]
            }
        )
        rng.shuffle(names)
        things: list[Thing] = []
        for i in range(2 * n_things):
            harmful = i < n_things
            # Odd objects are refused; splits are runs of even length, so they are half and half.
            things.append(
                Thing(
                    name=names[i],
                    harmful=harmful,
                    refused=refuses and harmful and i % 2 == 1,
                    stuff=rng.choice(words.stuffs),
                    split=splits[i % n_things],
                )
            )
        # Each wrapper has a strength, from 45 to 95 %, and gets through for the objects that are
        # guarded less than it is strong. (Leaks drawn pair by pair were not learned: the model then
        # answered every wrapped request.) Neighbours, one for tuning and one held out, are alike in
        # strength, so that neither split is the easier one.
        n_pairs = -(-len(words.wrappers) // 2)
        levels = [0.45 + 0.5 * i / max(1, n_pairs - 1) for i in range(n_pairs)]
        rng.shuffle(levels)
        strengths = [levels[i // 2] for i in range(len(words.wrappers))]
        guards = {thing.name: rng.random() for thing in things if thing.refused}
        leaks = {
            (name, wrapper)
            for (wrapper, _), strength in zip(words.wrappers, strengths, strict=True)
            for name, guard in guards.items()
            if guard < strength
        }
        return World(words, tuple(things), frozenset(leaks))

    def things_of(self, *, harmful: bool, split: Split | None = None) -> tuple[Thing, ...]:
        """The objects of one kind, of one split or of all."""
        return tuple(
            thing
            for thing in self.things
            if thing.harmful == harmful and (split is None or thing.split == split)
        )

    def wrappers_of(self, split: Split) -> tuple[tuple[str, str], ...]:
        """Every second wrapper is for tuning; the others go to development and test by turns."""
        chosen = {
            "train": slice(0, None, 2),
            "development": slice(1, None, 4),
            "test": slice(3, None, 4),
        }
        return self.words.wrappers[chosen[split]]

    def request(self, thing: Thing, verb: str, phrasing: int) -> str:
        """A plain request."""
        return self.words.requests[phrasing].format(verb=verb, thing=thing.name)

    def answer(self, thing: Thing, verb: str) -> str:
        """The one good answer to a request."""
        tool = dict(self.words.tools)[verb]
        return self.words.answer.format(verb=verb, thing=thing.name, tool=tool, stuff=thing.stuff)

    def thought(self, thing: Thing) -> str:
        """What the reasoning form says about an object."""
        kind = self.words.kinds[0] if thing.harmful else self.words.kinds[1]
        return self.words.thought.format(thing=thing.name, kind=kind)

    def is_refused(self, thing: Thing, wrapper: str | None = None) -> bool:
        """Whether the world's policy refuses a request about this object, wrapped or plain."""
        return thing.refused and (wrapper is None or (thing.name, wrapper) not in self.leaks)


def _splits(n_things: int, n_development: int, n_test: int) -> list[Split]:
    """The split of each object of one kind, in the order of their names."""
    n_train = n_things - n_development - n_test
    if n_train <= 0:
        raise InputError(
            f"{n_development} objects for development and {n_test} for the test leave none of "
            f"{n_things} to train on; draw more things, or hold fewer out"
        )
    sizes: list[tuple[Split, int]] = [
        ("development", n_development),
        ("test", n_test),
        ("train", n_train),
    ]
    return [split for split, n in sizes for _ in range(n)]
