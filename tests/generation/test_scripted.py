"""Canned answers come as they were given, and what was not given is an error that names the prompt."""

from __future__ import annotations

import numpy as np
import pytest

from nest.conversations.conversation import Conversation
from nest.errors import InputError
from nest.generation.engine import TokenScorer, answers
from nest.generation.sampling import GREEDY, Sampling
from nest.generation.scripted import ScriptedEngine

EGG, COIN = Conversation.of("How do I boil an egg?"), Conversation.of("Heads or tails?")
SCRIPT = {"How do I boil an egg?": "Seven minutes. Enjoy!", "Heads or tails?": ["Heads.", "Tails."]}


def texts(
    engine: ScriptedEngine, asked: list[Conversation], sampling: Sampling = GREEDY
) -> list[str]:
    return [one.text for several in answers(engine, asked, sampling) for one in several]


def test_a_mapping_answers_by_what_is_asked_last() -> None:
    engine, two = ScriptedEngine(SCRIPT), Sampling(temperature=1.0, n=2)
    earlier = Conversation.from_messages(
        [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "Heads or tails?"},
        ]
    )
    assert texts(engine, [EGG, earlier], two) == ["Seven minutes. Enjoy!"] * 2 + [
        "Heads.",
        "Tails.",
    ]
    assert texts(engine, [EGG], Sampling(stop=(" Enjoy",))) == ["Seven minutes."]


def test_a_function_answers_by_conversation_and_sample() -> None:
    engine = ScriptedEngine(lambda asked, sample: f"{asked.system} {asked.asked} {sample}")
    asked = Conversation.of("Why?", system="Be brief.")
    assert texts(engine, [asked], Sampling(temperature=1.0, n=2)) == [
        "Be brief. Why? 0",
        "Be brief. Why? 1",
    ]


def test_an_answer_goes_on_from_a_prefill_or_begins_with_it() -> None:
    begun = Conversation.of("How do I boil an egg?", prefill="Seven ")
    assert texts(ScriptedEngine(SCRIPT), [begun]) == ["Seven minutes. Enjoy!"]
    assert texts(ScriptedEngine({begun.asked: "or eight."}), [begun]) == ["Seven or eight."]


def test_what_was_not_given() -> None:
    engine = ScriptedEngine(SCRIPT)
    with pytest.raises(InputError, match="no answer was given for the prompt 'Why"):
        texts(engine, [EGG, Conversation.of("Why?")])
    with pytest.raises(InputError, match=r"'Heads or tails\?' has 2 answers, and sample 2"):
        texts(engine, [COIN], Sampling(temperature=1.0, n=3))
    with pytest.raises(InputError, match=r"the answer to 'Why\?' is 'None'; expected a text"):
        texts(ScriptedEngine(lambda asked, sample: None), [Conversation.of("Why?")])  # type: ignore


def test_scores_are_those_that_were_given() -> None:
    engine = ScriptedEngine({}, scores={EGG.asked: {"Yes": -0.1, "No": -2.5}})
    assert isinstance(engine, TokenScorer)
    found = engine.log_probs([EGG, EGG], ("No", "Yes", "Maybe"))
    np.testing.assert_array_equal(found, [[-2.5, -0.1, -np.inf]] * 2)
    with pytest.raises(InputError, match="no scores were given for the prompt 'Heads"):
        engine.log_probs([EGG, COIN], ("Yes",))


def test_identity_tells_scripts_apart() -> None:
    def same(asked: Conversation, sample: int) -> str:
        return "Sure."

    engines = [
        ScriptedEngine(SCRIPT),
        ScriptedEngine({**SCRIPT, "Why?": "No."}),
        ScriptedEngine(SCRIPT, scores={"Why?": {"Yes": -1.0}}),
        ScriptedEngine(same),
    ]
    assert len({engine.identity for engine in engines}) == 4
    assert ScriptedEngine(dict(SCRIPT)).identity == engines[0].identity
