"""Guards behind an engine, such as a server: asked by its template, read by their words."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from nest.conversations.thoughts import strip_thinking
from nest.errors import InputError
from nest.generation.engine import Engine
from nest.generation.sampling import Sampling
from nest.judging.asking import ask
from nest.judging.families import Family, family_of
from nest.judging.judge import Exchange, Judgement
from nest.judging.known_pair import HARMFUL, HARMLESS, check_told_apart
from nest.judging.phrases import PhraseJudge
from nest.judging.readings import UNREAD, Reading, joined, judged
from nest.judging.rendering import guard_conversation


class ServerGuard:
    """A guard behind an engine that takes conversations which end with the assistant's turn.

    There is no score: a server tells texts. An exchange that the engine refuses, one beyond the guard's
    context say, is unparsed; the engine's failures are errors.

    Args:
        engines: The guard's engine; of a family that is asked about several policies one for each, by the
            policy's name, whose template is given that policy.
        family: How it is read, by its name.
        phrases: Tells refusals where the guard does not.
        check: Judge a known pair first, and refuse a guard that does not tell it apart.

    Raises:
        InputError: an unknown family, one that needs a template of the user's, engines for other policies
            than the family's, or an engine that refuses the known pair.
        EngineError: the engine failed, or the known pair is not told apart.
    """

    def __init__(
        self,
        engines: Engine | Mapping[str, Engine],
        family: Family | str,
        *,
        phrases: PhraseJudge | None = None,
        check: bool = True,
    ) -> None:
        self.family = family_of(family) if isinstance(family, str) else family
        if self.family.name == "classifier":
            raise InputError(
                "a classifier is asked by a template of the user's, and a server asks by its own; run it "
                "here: classifier:PATH:TEMPLATE_FILE"
            )
        wanted = set(self.family.policies)
        given = set(engines) if isinstance(engines, Mapping) else set()
        if wanted != given:
            raise InputError(
                f"{self.family.name} is asked about {', '.join(sorted(wanted)) or 'no policies'}, and "
                f"engines are given for {', '.join(sorted(given)) or 'none'}; expected one for each"
            )
        self._engines: list[tuple[str | None, Engine]] = (
            list(engines.items()) if isinstance(engines, Mapping) else [(None, engines)]
        )
        first = self._engines[0][1]
        told = first.identity if first.name == "server" else first.name
        self.name = f"{self.family.name}:{told}"
        self._phrases = PhraseJudge() if phrases is None else phrases
        if check:
            (bad, bad_words), (good, good_words) = self._read(
                [HARMFUL, HARMLESS], must_take_all=True
            )
            check_told_apart(
                self.name, bad.harmful, good.harmful, f"{bad_words!r} and {good_words!r}"
            )

    @property
    def sha256(self) -> str:
        """Hash of the engines, the family and the phrases."""
        engines = (engine.identity for _, engine in self._engines)
        parts = (*engines, self.family.sha256, self._phrases.sha256)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def judge(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        """Judgements, one an exchange.

        Raises:
            EngineError: the engine failed.
        """
        return judged(exchanges, self._read, self._phrases, says_refusals=self.family.says_refusals)

    def _read(
        self, exchanges: Sequence[Exchange], *, must_take_all: bool = False
    ) -> list[tuple[Reading, str]]:
        last_only = self.family.last_turn_only
        conversations = [guard_conversation(one, last_only=last_only) for one in exchanges]
        sampling = Sampling(max_new_tokens=self.family.max_new_tokens)
        by_row: list[list[tuple[str | None, Reading]]] = [[] for _ in exchanges]
        words: list[list[str]] = [[] for _ in exchanges]
        for policy, engine in self._engines:
            answers = ask(engine, conversations, sampling, must_take_all=must_take_all)
            for row, answer in enumerate(answers):
                reading = self.family.read(answer.text) if answer.fault is None else UNREAD
                said = strip_thinking(answer.text) if answer.fault is None else answer.fault
                by_row[row].append((policy, reading))
                words[row].append(said if policy is None else f"{policy}: {said}")
        return [
            (joined(readings), "\n".join(said))
            for readings, said in zip(by_row, words, strict=True)
        ]
