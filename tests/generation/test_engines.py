"""What every engine keeps to, one row each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import fake_vllm
import pytest
from stand_in import StandIn
from tiny_models import WORDS, build, encoder_of

from nest.conversations.conversation import Conversation
from nest.errors import InputError, NestError
from nest.generation.engine import Completion, Engine, answers
from nest.generation.paged import PagedEngine
from nest.generation.sampling import GREEDY, Sampling
from nest.generation.scripted import ScriptedEngine
from nest.generation.server import ServerEngine
from nest.generation.static import StaticEngine
from nest.generation.vllm import VllmEngine


class Row(NamedTuple):
    """An engine, whether it draws, and whether its answers come in the conversations' order."""

    engine: Engine
    draws: bool = True
    in_order: bool = True


def said_to(asked: object, seed: object) -> str:
    return " ".join(fake_vllm.words_for(asked, seed, 9))


def make_static() -> Iterator[Row]:
    model = build()
    yield Row(StaticEngine(model, encoder_of(model), batch_size=5), in_order=False)


def make_paged() -> Iterator[Row]:
    model = build()
    yield Row(PagedEngine(model, encoder_of(model), batch_size=5), draws=False, in_order=False)


def make_server() -> Iterator[Row]:
    with StandIn(lambda body: said_to(body["messages"], body.get("seed"))) as server:
        yield Row(ServerEngine(server.url, "tiny", in_flight=3))


def make_vllm() -> Iterator[Row]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm", fake_vllm.module())
        yield Row(VllmEngine("folder"))


def make_scripted() -> Iterator[Row]:
    yield Row(ScriptedEngine(lambda asked, sample: said_to(asked, sample)))


MAKERS: dict[str, Callable[[], Iterator[Row]]] = {
    "static": make_static,
    "paged": make_paged,
    "server": make_server,
    "vllm": make_vllm,
    "scripted": make_scripted,
}
ASKED = [" ".join(WORDS[i : i + 2 + i % 5]) for i in range(12)]
CONVERSATIONS = [Conversation.of(text) for text in ASKED]
LONG = Sampling(max_new_tokens=10)


@pytest.fixture(params=MAKERS)
def row(request: pytest.FixtureRequest) -> Iterator[Row]:
    yield from MAKERS[request.param]()


def drawn(row: Row, **changes: object) -> Sampling:
    """Several samples where the engine draws; else one, greedy."""
    given: dict[str, object] = {"max_new_tokens": 10}
    if row.draws:
        given |= {"temperature": 1.0, "n": 3}
    return Sampling(**given | changes)  # type: ignore[arg-type]


def in_pairs(found: Sequence[Completion]) -> list[tuple[int, int]]:
    return [(one.conversation, one.sample) for one in found]


def test_it_is_an_engine_with_a_name_and_an_identity(row: Row) -> None:
    assert isinstance(row.engine, Engine)
    assert row.engine.name in MAKERS
    assert row.engine.identity and row.engine.identity == row.engine.identity


def test_every_answer_comes_once_and_in_the_same_order_each_time(row: Row) -> None:
    sampling = drawn(row)
    first, second = (list(row.engine.generate(CONVERSATIONS, sampling)) for _ in range(2))
    expected = [(i, j) for i in range(len(CONVERSATIONS)) for j in range(sampling.n)]
    assert first == second
    assert sorted(in_pairs(first)) == expected
    assert not row.in_order or in_pairs(first) == expected
    assert len({one.text for one in first}) > len(CONVERSATIONS) / 2
    grouped = answers(row.engine, CONVERSATIONS, sampling)
    assert [one for several in grouped for one in several] == sorted(first)


def test_what_is_skipped_does_not_come_and_the_rest_stays(row: Row) -> None:
    sampling = drawn(row)
    whole = list(row.engine.generate(CONVERSATIONS, sampling))
    skip = {pair for place, pair in enumerate(in_pairs(whole)) if place % 3 == 0 or place < 9}
    rest = list(row.engine.generate(CONVERSATIONS, sampling, skip=skip))
    assert rest == [one for one in whole if in_pairs([one])[0] not in skip]
    everything = set(in_pairs(whole))
    assert list(row.engine.generate(CONVERSATIONS, sampling, skip=everything)) == []


def test_no_conversations_no_answers(row: Row) -> None:
    assert list(row.engine.generate([], GREEDY)) == []


def test_samples_differ_and_the_seed_decides(row: Row) -> None:
    if not row.draws:
        with pytest.raises(InputError, match=r"temperature is 1\.0.*static"):
            row.engine.generate(CONVERSATIONS, Sampling(temperature=1.0))
        return
    found = answers(row.engine, CONVERSATIONS, drawn(row))
    assert sum(len({one.text for one in several}) for several in found) > 2 * len(found)
    if row.engine.name != "scripted":
        others = answers(row.engine, CONVERSATIONS, drawn(row, seed=1))
        pairs = zip(found, others, strict=True)
        assert sum(a[0].text != b[0].text for a, b in pairs) > len(found) / 2


def test_a_stop_text_ends_an_answer(row: Row) -> None:
    whole = [several[0] for several in answers(row.engine, CONVERSATIONS, LONG)]
    for number, one in enumerate(whole[:5]):
        words = one.text.split()
        stop = words[len(words) // 2]
        sampling = Sampling(max_new_tokens=10, stop=("never said", stop))
        (cut,) = row.engine.generate([CONVERSATIONS[number]], sampling)
        assert cut.text == one.text[: one.text.find(stop)].rstrip()
        assert cut.finish == "stop"
        if one.token_ids is not None and cut.token_ids is not None:
            assert one.token_ids[: len(cut.token_ids)] == cut.token_ids
            assert cut.n_tokens == len(cut.token_ids)


def test_the_limit_ends_an_answer(row: Row) -> None:
    for one in row.engine.generate(CONVERSATIONS, Sampling(max_new_tokens=2)):
        if row.engine.name == "scripted":
            assert one.finish == "stop"
        elif one.finish == "length":
            assert one.n_tokens == 2
        else:
            assert one.n_tokens is not None and one.n_tokens < 2


@pytest.mark.parametrize("prefill", ["sure here", "sure "])
def test_an_answer_goes_on_from_its_prefill(row: Row, prefill: str) -> None:
    begun = [Conversation.of(text, prefill=prefill) for text in ASKED]
    plain = [several[0].text for several in answers(row.engine, CONVERSATIONS, LONG)]
    found = [several[0].text for several in answers(row.engine, begun, LONG)]
    for before, text in zip(plain, found, strict=True):
        assert text.startswith(prefill)
        assert len(text) > len(prefill)
        assert text != prefill + before or row.engine.name == "scripted"
    mixed = [CONVERSATIONS[0], begun[0], CONVERSATIONS[1]]
    texts = [several[0].text for several in answers(row.engine, mixed, LONG)]
    assert texts == [plain[0], found[0], plain[1]]


def test_system_and_earlier_turns_reach_the_model(row: Row) -> None:
    turns = [("user", "tell me"), ("assistant", "sure here"), ("user", ASKED[0])]
    several = Conversation.from_messages([{"role": r, "content": c} for r, c in turns])
    conversations = [CONVERSATIONS[0], Conversation.of(ASKED[0], system="sorry no"), several]
    texts = [found[0].text for found in answers(row.engine, conversations, LONG)]
    assert len(set(texts)) == 3


def test_a_conversation_that_was_answered_already(row: Row) -> None:
    answered = CONVERSATIONS[0].answered("sure here")
    with pytest.raises(InputError, match="ends with the turn of the assistant"):
        list(row.engine.generate([CONVERSATIONS[1], answered], GREEDY))


def test_a_conversation_with_a_picture(row: Row) -> None:
    if row.engine.name in ("server", "vllm", "scripted"):
        pytest.skip("passes it on")
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    parts = [{"type": "text", "text": "tell me"}, picture]
    asked = Conversation.from_messages([{"role": "user", "content": parts}])
    with pytest.raises(NestError, match="image_url"):
        list(row.engine.generate([asked], GREEDY))
