"""What tuning learns from: dialogues as tokens, split, shuffled and put into batches."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from nest.conversations.batches import Batch, check_completion_mask, collate
from nest.conversations.conversation import Conversation
from nest.conversations.encoders import Encoder, TurnEncoder
from nest.errors import InputError
from nest.prompts.prompt_set import PromptSet
from nest.tuning.config import TrainOn, TuningConfig

# Batches within which examples are put together by length.
WINDOW = 16


@dataclass(frozen=True)
class Example:
    """One dialogue in tokens.

    Attributes:
        ids: Token ids of prompt and response.
        said: How many of them are the prompt's, or which of them are the assistant's.
        benign: Whether the prompt is to be answered, and not refused.
    """

    ids: tuple[int, ...]
    said: int | tuple[bool, ...]
    benign: bool

    @property
    def n_targets(self) -> int:
        """How many of its tokens are learned."""
        return len(self.ids) - self.said if isinstance(self.said, int) else sum(self.said)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Looked up many times a step; a tuple would compute its own anew each time."""
        return hash((self.ids, self.said, self.benign))


@dataclass(frozen=True)
class MicroBatch:
    """Examples that go through the model together.

    Attributes:
        batch: Their padded tokens.
        examples: The examples, row by row.
        pad_id: Fills up.
    """

    batch: Batch
    examples: tuple[Example, ...]
    pad_id: int

    @staticmethod
    def of(examples: Sequence[Example], pad_id: int) -> MicroBatch:
        """Pad and check the examples."""
        ids = [example.ids for example in examples]
        batch = collate(ids, [example.said for example in examples], pad_id)
        check_completion_mask(batch)
        return MicroBatch(batch, tuple(examples), pad_id)

    @property
    def benign_rows(self) -> tuple[Example, ...]:
        """The benign examples, in order."""
        return tuple(example for example in self.examples if example.benign)


def encode_dialogues(
    encoder: Encoder, dialogues: PromptSet, *, benign: bool, train_on: TrainOn = "last"
) -> list[Example]:
    """Token ids of every dialogue of a set.

    Args:
        encoder: Turns them into tokens.
        dialogues: Conversations with their responses.
        benign: Whether they are to be answered.
        train_on: Whether only the last of the assistant's turns is learned, or `all`.

    Raises:
        InputError: prompts without responses, an empty response, one longer than the context, or several
            turns to learn and an encoder or template that cannot tell them.
    """
    return [
        _example(encoder, asked, response, benign, train_on)
        for asked, response in dialogues.chats()
    ]


def _example(
    encoder: Encoder, asked: Conversation, response: str, benign: bool, train_on: TrainOn
) -> Example:
    several = any(turn.role == "assistant" for turn in asked.turns)
    if train_on == "last" or not several:
        ids, n_prompt = encoder.dialogue(asked, response)
        return Example(tuple(ids), n_prompt, benign)
    if not isinstance(encoder, TurnEncoder):
        raise InputError(
            f"the conversation that ends with {asked.asked[:40]!r} has several turns of the assistant, "
            "and this encoder has no turns(conversation) to tell them; train on the last one"
        )
    ids, said = encoder.turns(asked.answered(response))
    return Example(tuple(ids), tuple(said), benign)


def split_validation(
    harmful: Sequence[Example], benign: Sequence[Example], *, share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Hold back the same share of both kinds, at least one dialogue each.

    Returns:
        The training and the validation dialogues.

    Raises:
        InputError: fewer than two dialogues of a kind.
    """
    rng = random.Random(seed)
    train: list[Example] = []
    validation: list[Example] = []
    for kind, examples in (("harmful", harmful), ("benign", benign)):
        if len(examples) < 2:
            raise InputError(
                f"there are {len(examples)} {kind} dialogues; give at least 2 (some hundreds are better)"
            )
        shuffled = rng.sample(list(examples), len(examples))
        n_held = max(1, round(share * len(shuffled)))
        n_held = min(n_held, len(shuffled) - 1)
        validation += shuffled[:n_held]
        train += shuffled[n_held:]
    return train, validation


def prepare(
    encoder: Encoder, harmful: PromptSet, benign: PromptSet, config: TuningConfig
) -> tuple[list[Example], list[Example], int]:
    """Training and validation dialogues, and the optimizer steps that the config asks for.

    Raises:
        InputError: see `encode_dialogues` and `split_validation`.
    """
    return course_of(
        encode_dialogues(encoder, harmful, benign=False, train_on=config.train_on),
        encode_dialogues(encoder, benign, benign=True, train_on=config.train_on),
        config,
    )


def course_of(
    harmful: Sequence[Example], benign: Sequence[Example], config: TuningConfig
) -> tuple[list[Example], list[Example], int]:
    """The same of dialogues that are tokens already.

    Raises:
        InputError: see `split_validation`.
    """
    train, validation = split_validation(harmful, benign, share=config.validation, seed=config.seed)
    n_steps = math.ceil(config.epochs * steps_per_epoch(len(train), config.batch_size))
    return train, validation, min(n_steps, config.max_steps or n_steps)


def epochs_of_batches(
    examples: Sequence[Example], batch_size: int, *, seed: int
) -> Iterator[list[Example]]:
    """Batches without end: every epoch is a new order in which each example stands once.

    Both kinds are dealt out evenly, so that every batch holds them in about the data's proportion.
    Within a window of some batches those of like lengths are put together: on the organism 45 % of
    the tokens of random batches were padding. The last batch of an epoch may be smaller.
    """
    rng = random.Random(seed)
    while True:
        window = WINDOW * batch_size
        order = _interleaved(examples, rng)
        batches = []
        for start in range(0, len(order), window):
            alike = _by_length(order[start : start + window])
            batches += [alike[i : i + batch_size] for i in range(0, len(alike), batch_size)]
        rng.shuffle(batches)
        yield from batches


def _interleaved(examples: Sequence[Example], rng: random.Random) -> list[Example]:
    """Both kinds in random order, spread evenly over the whole."""
    placed = []
    for kind in (True, False):
        members = [example for example in examples if example.benign == kind]
        rng.shuffle(members)
        offset = rng.random()
        placed += [((i + offset) / len(members), e) for i, e in enumerate(members)]
    placed.sort(key=lambda item: item[0])
    return [example for _, example in placed]


def _by_length(examples: Sequence[Example]) -> list[Example]:
    """Each kind sorted by length, on the places that its kind had before."""
    kinds = {
        kind: iter(sorted((e for e in examples if e.benign == kind), key=lambda e: len(e.ids)))
        for kind in (True, False)
    }
    return [next(kinds[example.benign]) for example in examples]


def steps_per_epoch(n_examples: int, batch_size: int) -> int:
    """Optimizer steps in which every example is seen once."""
    return -(-n_examples // batch_size)


def to_micro_batches(
    examples: Sequence[Example], micro_batch_size: int, pad_id: int
) -> list[MicroBatch]:
    """Padded micro-batches of like lengths.

    Raises:
        InputError: a row that would learn from all of its tokens, or from none.
    """
    ordered = sorted(examples, key=lambda example: len(example.ids))
    return [
        MicroBatch.of(ordered[start : start + micro_batch_size], pad_id)
        for start in range(0, len(ordered), micro_batch_size)
    ]
