"""The answers to an evaluation's requests: asked of an engine, and kept so that a later run goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from nest.artifacts.unfinished import Unfinished
from nest.conversations.conversation import Conversation
from nest.errors import EngineError
from nest.generation.engine import Completion, Engine
from nest.generation.sampling import Sampling

KEPT_EVERY_SECONDS = 1.0
"""So much of the work is lost at most when a run is killed."""


class Answer(NamedTuple):
    """What is kept of an answer.

    Attributes:
        text: What the model said.
        n_tokens: In how many tokens; None where nobody says.
        finish: `stop`, `length` or `unknown`.
    """

    text: str
    n_tokens: int | None
    finish: str


def answered(
    engine: Engine,
    conversations: Sequence[Conversation],
    sampling: Sampling,
    work: Unfinished | None = None,
) -> list[list[Answer]]:
    """For each conversation its answers, in the samples' order.

    Args:
        engine: Asked for what an earlier run has not left in `work`.
        conversations: Each ends with a user turn.
        sampling: How they are answered.
        work: Keeps the answers, at least once a second.

    Raises:
        InputError, EngineError: see `Engine.generate`; and an engine that leaves answers out.
    """
    found = _kept(work)
    pending: list[Completion] = []
    kept_at = time.monotonic()
    try:
        for completion in engine.generate(conversations, sampling, skip=set(found)):
            pending.append(completion)
            if time.monotonic() - kept_at >= KEPT_EVERY_SECONDS:
                found |= _keep(pending, work)
                kept_at = time.monotonic()
    finally:
        found |= _keep(pending, work)
    wanted = [(i, s) for i in range(len(conversations)) for s in range(sampling.n)]
    missing = [pair for pair in wanted if pair not in found]
    if missing:
        raise EngineError(
            f"the engine {engine.name} left {len(missing)} of {len(wanted)} answers out, the first to "
            f"{conversations[missing[0][0]].asked[:60]!r}"
        )
    return [[found[i, s] for s in range(sampling.n)] for i in range(len(conversations))]


def _keep(pending: list[Completion], work: Unfinished | None) -> dict[tuple[int, int], Answer]:
    """Take what is pending, and write it down."""
    new = {
        (one.conversation, one.sample): Answer(one.text, one.n_tokens, one.finish)
        for one in pending
    }
    pending.clear()
    if work is not None and new:
        entry: dict[str, Any] = {f"{i}.{s}": list(answer) for (i, s), answer in new.items()}
        work.journal.add({"answers": entry})
    return new


def _kept(work: Unfinished | None) -> dict[tuple[int, int], Answer]:
    entries = () if work is None else work.journal.entries
    found = {}
    for entry in entries:
        for key, (text, n_tokens, finish) in entry.get("answers", {}).items():
            number, _, sample = key.partition(".")
            found[int(number), int(sample)] = Answer(text, n_tokens, finish)
    return found
