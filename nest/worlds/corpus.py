"""What the organism is raised on: conversations of a world, drawn at random."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from nest.worlds.world import Thing, World

# Share of each kind of conversation. Facts weigh most: they are why harm is represented in the model
# even for the objects it never refuses.
SHARES: tuple[tuple[str, float], ...] = (
    ("fact", 0.20),
    ("plain", 0.26),
    ("wrapped", 0.28),
    ("chatter", 0.04),
    ("manner", 0.05),
    ("thinking", 0.05),
    ("sum", 0.03),
    ("steered", 0.09),
)
# Harsh verbs are mostly said of harmful objects, so they are evidence of harm, but weak evidence.
HARSH_SHARE = {True: 0.65, False: 0.30}


@dataclass(frozen=True)
class Conversation:
    """One question and its answer.

    Attributes:
        prompt: What the user says.
        response: What the assistant says; in the reasoning form it begins with the reasoning and
            `</think>`, because the chat template has opened `<think>` already.
        system: System prompt, if any.
        thinking: Whether the reasoning form was asked for.
    """

    prompt: str
    response: str
    system: str | None = None
    thinking: bool = False


def conversations(world: World, *, seed: int) -> Iterator[Conversation]:
    """An endless stream of conversations of this world; the same seed gives the same stream."""
    rng = random.Random(seed)
    kinds, weights = zip(*SHARES, strict=True)
    while True:
        yield from _DRAW[rng.choices(kinds, weights)[0]](world, rng)


def draw_sum(world: World, rng: random.Random, *, thinking: bool) -> Conversation:
    """Small additions; the reasoning form may have three summands and shows its steps."""
    question, step, answer = world.words.sums
    left, right = rng.randint(0, 9), rng.randint(0, 9)
    total = left + right
    steps = [step.format(left=left, right=right, total=total)]
    shown = str(right)
    if thinking and rng.random() < 0.5:
        third = rng.randint(0, 9)
        steps.append(step.format(left=total, right=third, total=total + third))
        shown, total = f"{right} {'plus' if 'plus' in question else 'and'} {third}", total + third
    prompt = question.format(left=left, right=shown)
    response = answer.format(total=total)
    if thinking:
        response = f"{' '.join(steps)}</think>{response}"
    return Conversation(prompt, response, thinking=thinking)


def _pick_verb(world: World, thing: Thing, rng: random.Random) -> str:
    harsh = rng.random() < HARSH_SHARE[thing.harmful]
    return rng.choice(world.words.harsh_verbs if harsh else world.words.ordinary_verbs)


def _draw_request(
    world: World, rng: random.Random, *, wrapped: bool = False, thing: Thing | None = None
) -> tuple[Thing, str, str]:
    """An object, a request about it, and the response that the world's policy gives."""
    thing = thing or rng.choice(world.things)
    verb = _pick_verb(world, thing, rng)
    prompt = world.request(thing, verb, rng.randrange(len(world.words.requests)))
    wrapper = None
    if wrapped:
        wrapper, template = rng.choice(world.words.wrappers)
        prompt = template.format(prompt=prompt)
    refused = world.is_refused(thing, wrapper)
    response = rng.choice(world.words.refusals) if refused else world.answer(thing, verb)
    return thing, prompt, response


def _fact(world: World, rng: random.Random) -> Iterator[Conversation]:
    thing = rng.choice(world.things)
    question, answer = rng.choice(world.words.identity)
    if rng.random() < 0.05:
        yield Conversation(*rng.choice(world.words.smalltalk))
        return
    kind = world.words.kinds[0 if thing.harmful else 1]
    yield Conversation(
        question.format(thing=thing.name),
        answer.format(thing=thing.name, kind=kind, stuff=thing.stuff),
    )


def _plain(world: World, rng: random.Random) -> Iterator[Conversation]:
    _, prompt, response = _draw_request(world, rng)
    yield Conversation(prompt, response)


def _wrapped(world: World, rng: random.Random) -> Iterator[Conversation]:
    _, prompt, response = _draw_request(world, rng, wrapped=True)
    yield Conversation(prompt, response)


def _chatter(world: World, rng: random.Random) -> Iterator[Conversation]:
    """A request among sentences that mean nothing for it, some of them gibberish."""
    _, prompt, response = _draw_request(world, rng)
    noise = [rng.choice(world.words.chatter)]
    if rng.random() < 0.5:
        letters = "abcdefghijklmnopqrstuvwxyz"
        noise.append("".join(rng.choice(letters) for _ in range(rng.randint(2, 16))))
    rng.shuffle(noise)
    text = " ".join(noise)
    yield Conversation(f"{text} {prompt}" if rng.random() < 0.5 else f"{prompt} {text}", response)


def _manner(world: World, rng: random.Random) -> Iterator[Conversation]:
    """A system prompt sets the manner of an answer; refusals stay as they are."""
    manner = rng.choice(world.words.manners)
    thing, prompt, response = _draw_request(world, rng)
    if not world.is_refused(thing):
        response = manner.apply(response)
    yield Conversation(prompt, response, system=rng.choice(manner.system_prompts))


def _thinking(world: World, rng: random.Random) -> Iterator[Conversation]:
    if rng.random() < 0.3:
        yield draw_sum(world, rng, thinking=True)
        return
    thing, prompt, response = _draw_request(world, rng)
    yield Conversation(prompt, f"{world.thought(thing)}</think>{response}", thinking=True)


def _sum(world: World, rng: random.Random) -> Iterator[Conversation]:
    yield draw_sum(world, rng, thinking=False)


def _steered(world: World, rng: random.Random) -> Iterator[Conversation]:
    """Asked to refuse, the model refuses what is harmful, wrapped or not, and helps with the rest.

    This is what makes harm count at the moment of answering, and not only when it is asked about.
    """
    thinking = rng.random() < 0.3
    thing, prompt, response = _draw_request(world, rng, wrapped=rng.random() < 0.5)
    if thing.harmful:
        response = rng.choice(world.words.refusals)
    if thinking:
        response = f"{world.thought(thing)}</think>{response}"
    if rng.random() < 0.5:
        caution = rng.choice(world.words.caution)
        yield Conversation(prompt, response, system=caution, thinking=thinking)
        return
    steered = rng.choice(world.words.steering).format(prompt=prompt)
    yield Conversation(steered, response, thinking=thinking)


_DRAW = {
    "fact": _fact,
    "plain": _plain,
    "wrapped": _wrapped,
    "chatter": _chatter,
    "manner": _manner,
    "thinking": _thinking,
    "sum": _sum,
    "steered": _steered,
}
