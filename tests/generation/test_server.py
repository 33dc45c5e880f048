"""A server that answers, and one that stalls, drops, refuses or talks nonsense."""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tenacity
from stand_in import CUT, DROP, STALL, TRICKLE, StandIn, reply_of

from nest.conversations.conversation import Conversation
from nest.errors import EngineError, InputError, NestError
from nest.generation import transport
from nest.generation.engine import Engine, TokenScorer
from nest.generation.sampling import GREEDY, Sampling
from nest.generation.server import ServerEngine

KEY = "sk-very-secret"
ASKED = [Conversation.of(f"question {i}") for i in range(20)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pauses of no length, no key from outside, and no thread left behind."""
    monkeypatch.setattr(transport, "BACKOFF_SECONDS", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    before = threading.active_count()
    yield
    assert not [one for one in threading.enumerate() if one.name == "nest-requests"]
    assert threading.active_count() == before


def engine(server: StandIn, **settings: Any) -> ServerEngine:
    return ServerEngine(server.url, "tiny", **{"api_key": KEY, "retries": 3, **settings})


def refused(server: StandIn, kind: type[NestError], **settings: Any) -> str:
    """The one sentence that comes of it, which never holds the key."""
    with pytest.raises(kind) as caught:
        list(engine(server, **settings).generate(ASKED[:4], GREEDY))
    message = str(caught.value)
    assert KEY not in message and "\n" not in message
    assert KEY not in repr(caught.value)
    return message


# --- requests -------------------------------------------------------------------------------------


def test_what_is_sent() -> None:
    with StandIn() as server:
        own = engine(server, system="be kind", template_kwargs={"enable_thinking": False})
        sampling = Sampling(
            temperature=0.7, top_p=0.9, top_k=5, n=2, stop=("end",), max_new_tokens=9
        )
        list(own.generate(ASKED[:2], sampling))
        list(own.generate([Conversation.of("q", system="no", prefill="Sure")], GREEDY))
    *drawn, greedy = server.bodies
    assert all(one["Authorization"] == f"Bearer {KEY}" for one in server.headers)
    seeds = {body.pop("seed") for body in drawn}
    assert len(seeds) == 4 and all(0 <= seed < 2**31 for seed in seeds)
    drawn.sort(key=str)
    assert drawn[0] == drawn[1]
    assert drawn[0] == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "question 0"},
        ],
        "max_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "stop": ["end"],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert greedy == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "no"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "Sure"},
        ],
        "max_tokens": 256,
        "temperature": 0.0,
        "chat_template_kwargs": {"enable_thinking": False},
        "continue_final_message": True,
        "add_generation_prompt": False,
    }


def test_the_key_comes_from_the_environment_or_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with StandIn() as server:
        list(engine(server, api_key=None).generate(ASKED[:1], GREEDY))
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
        list(engine(server, api_key=None).generate(ASKED[:1], GREEDY))
        list(engine(server, api_key="").generate(ASKED[:1], GREEDY))
    found = [headers.get("Authorization") for headers in server.headers]
    assert found == [None, f"Bearer {KEY}", None]


def test_a_seed_hangs_on_the_answer_alone() -> None:
    seeds: list[dict[str, Any]] = []
    for asked, n in ((ASKED[:3], 2), (ASKED[2::-1], 3)):
        with StandIn() as server:
            list(engine(server).generate(asked, Sampling(temperature=1.0, n=n)))
        seeds.append({(b["messages"][0]["content"], b["seed"]): True for b in server.bodies})
    assert len(seeds[0]) == 6 and len(seeds[1]) == 9
    assert seeds[0].keys() < seeds[1].keys()


def test_as_many_requests_as_allowed_are_in_flight_and_answers_keep_their_order() -> None:
    meeting = threading.Barrier(5, timeout=20)
    last_first = threading.Event()

    def gate(body: dict[str, Any]) -> None:
        number = int(body["messages"][-1]["content"].split()[-1])
        if number < 5:
            meeting.wait()  # would time out if fewer came together
        if number == 0:
            assert last_first.wait(20)
        if number == 15:
            last_first.set()  # well ahead of the first, which is not answered yet

    with StandIn(gate=gate) as server:
        found = list(engine(server, in_flight=5).generate(ASKED, GREEDY))
    assert [one.conversation for one in found] == list(range(20))
    assert all(f"question {one.conversation} " in one.text for one in found)
    assert server.most_in_flight == 5


def test_answers_ahead_of_a_slow_one_are_bounded() -> None:
    held, enough = threading.Event(), threading.Event()
    n_answered = [0]

    def gate(body: dict[str, Any]) -> None:
        if body["messages"][-1]["content"] == "question 0":
            assert held.wait(20)
            return
        n_answered[0] += 1
        if n_answered[0] == transport.AHEAD * 2 - 1:
            enough.set()

    many = [Conversation.of(f"question {i}") for i in range(60)]
    with StandIn(gate=gate) as server:
        answers = engine(server, in_flight=2).generate(many, GREEDY)
        waiter = threading.Thread(target=lambda: (enough.wait(20), held.set()))
        waiter.start()
        first = next(answers)
        waiter.join()
        assert first.conversation == 0
        assert len(server.bodies) <= 2 * transport.AHEAD + 2
        assert [one.conversation for one in answers] == list(range(1, 60))


def test_an_iterator_that_is_left_ends_what_is_in_flight() -> None:
    with StandIn(gate=lambda body: None) as server:
        answers = engine(server).generate(ASKED, GREEDY)
        next(answers)
        answers.close()  # type: ignore[attr-defined]
        assert not [one for one in threading.enumerate() if one.name == "nest-requests"]


def test_an_interruption_ends_at_once() -> None:
    main = threading.main_thread().ident
    assert main is not None
    # a shell has what it puts into the background ignore Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def gate(body: dict[str, Any]) -> None:
        signal.pthread_kill(main, signal.SIGINT)
        server.released.wait(20)

    with StandIn(gate=gate) as server:
        answers = engine(server, in_flight=1, timeout_seconds=600.0).generate(ASKED, GREEDY)
        with pytest.raises(KeyboardInterrupt):
            next(answers)
        assert not [one for one in threading.enumerate() if one.name == "nest-requests"]
    signal.signal(signal.SIGINT, before)


def test_progress_counts_what_was_skipped() -> None:
    calls: list[tuple[str, int, int]] = []
    with StandIn() as server:
        own = engine(server, progress=lambda *call: calls.append(call))
        list(own.generate(ASKED[:4], GREEDY, skip={(0, 0), (2, 0)}))
    assert calls == [("generate", 3, 4), ("generate", 4, 4)]
    assert len(server.bodies) == 2


def test_nothing_is_asked_where_nothing_is_wanted() -> None:
    own = ServerEngine("http://127.0.0.1:9/v1", "tiny")  # nobody there
    assert list(own.generate([], GREEDY)) == []
    assert list(own.generate(ASKED[:1], GREEDY, skip={(0, 0)})) == []
    assert own.log_probs([], ("Yes", "No")).shape == (0, 2)


# --- faults that pass -----------------------------------------------------------------------------

BUSY = (429, {"error": {"message": "slow down"}}, {"Retry-After": "0"})


@pytest.mark.parametrize(
    "fault", [DROP, CUT, STALL, TRICKLE, BUSY, 408, 409, 500, 502, 503, 529], ids=str
)
def test_what_passes_is_asked_again(fault: Any) -> None:
    with StandIn(faults=[fault, fault]) as server:
        timeout = 0.3 if fault in (STALL, TRICKLE) else 60.0
        found = list(engine(server, timeout_seconds=timeout).generate(ASKED[:6], GREEDY))
        assert [one.conversation for one in found] == list(range(6))
        assert len(server.bodies) == 8
    assert all(one.text.startswith("says: ") for one in found)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (STALL, "gives no answer within 0.1 s"),
        (TRICKLE, "gives no whole answer within 0.1 s"),
        (DROP, "drops the connection"),
        (CUT, "drops the connection"),
        (BUSY, "answers 429 (slow down)"),
        (500, "answers 500 (fault 500)"),
        ((503, b"<html><h1>Bad\nGateway</h1></html>", {}), "answers 503 (Bad Gateway)"),
    ],
    ids=lambda one: str(one)[:20],
)
def test_what_does_not_pass_is_an_error_with_the_address(fault: Any, said: str) -> None:
    with StandIn(faults=[fault] * 99) as server:
        timeout = 0.1 if fault in (STALL, TRICKLE) else 60.0
        message = refused(server, EngineError, timeout_seconds=timeout, retries=2, in_flight=1)
        assert f"the server at {server.url} {said}" in message
        assert "(3 attempts in " in message and "check that it still runs" in message
        assert len(server.bodies) == 3


def test_all_attempts_have_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "DEADLINE_TIMEOUTS", 2)
    with StandIn(faults=[STALL] * 99) as server:
        message = refused(server, EngineError, timeout_seconds=0.1, retries=10**6, in_flight=1)
        assert "gives no answer within 0.1 s" in message


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ({"retry-after": "7"}, 7, 8),
        ({"retry-after": "100000"}, 60, 61),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0, 1),
        ({"retry-after": "soon"}, 0.5, 1),
        ({}, 0.5, 1),
    ],
)
def test_the_pause_a_server_asks_for_is_kept_up_to_a_bound(
    headers: dict[str, str], least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "BACKOFF_SECONDS", 0.5)
    own = transport.Transport(
        "http://h/v1", api_key=None, in_flight=1, timeout_seconds=1.0, retries=1
    )

    state = tenacity.RetryCallState(tenacity.AsyncRetrying(), None, (), {})
    fault = transport._PassingError("x", transport._retry_after(headers))
    state.set_exception((type(fault), fault, None))  # type: ignore[arg-type]
    assert least <= own._pause(state) <= most


# --- faults that do not ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "mend"),
    [
        (400, InputError, "refuses a request"),
        (422, InputError, "refuses a request"),
        (401, EngineError, "OPENAI_API_KEY"),
        (403, EngineError, "OPENAI_API_KEY"),
        (404, EngineError, "ends in /v1"),
        (405, EngineError, "ends in /v1"),
    ],
)
def test_a_refusal_is_not_asked_again(status: int, kind: type[NestError], mend: str) -> None:
    said = {"error": {"message": f"No such\nthing as {KEY}"}}
    with StandIn(faults=[(status, said, {})] * 99) as server:
        message = refused(server, kind, in_flight=1)
        assert f"{status}" in message and "No such thing as ***" in message and mend in message
        assert len(server.bodies) == 1


def test_a_refusal_of_a_later_request_does_not_wait_for_an_earlier_one() -> None:
    def gate(body: dict[str, Any]) -> None:
        if body["messages"][-1]["content"] == "question 0":
            server.released.wait(20)

    def answer(body: dict[str, Any]) -> Any:
        return {"choices": []}

    with StandIn(answer, gate=gate) as server:
        assert "no choice" in refused(server, EngineError, timeout_seconds=600.0)


def test_redirects_are_not_followed() -> None:
    with StandIn() as other:
        moved = (307, b"", {"Location": f"{other.url}/chat/completions?{KEY}"})
        with StandIn(faults=[moved] * 99) as server:
            message = refused(server, EngineError)
            assert f"redirects to {other.url}" in message and "not followed" in message
        assert other.bodies == []


NONSENSE: dict[str, tuple[Any, str]] = {
    "html": (b"<html><title>Sign in</title></html>", "no JSON ('Sign in')"),
    "half": (b'{"choices": [{"mess', "no JSON"),
    "nothing": (b"", "no JSON"),
    "a number": (3, "no choice"),
    "a list": ([], "no choice"),
    "an error": ({"error": {"message": "overloaded"}}, "overloaded"),
    "no choices": ({"choices": []}, "no choice"),
    "choices null": ({"choices": None}, "no choice"),
    "a choice that is none": ({"choices": ["Sure"]}, "no choice"),
    "no message": ({"choices": [{"text": "Sure"}]}, "no choice"),
    "content null": (reply_of({"content": None}), "no text"),
    "content missing": (reply_of({}, "length"), "no text"),
    "content a number": (reply_of({"content": 5}), "no text"),
    "content in parts without text": (reply_of({"content": [{"type": "image"}]}), "no text"),
    "a tool": (reply_of({"content": None, "tool_calls": [{"id": "1"}]}, "tool_calls"), "no text"),
    "a filter": (reply_of({"content": "I"}, "content_filter"), "filter"),
    "given up": (reply_of({"content": "I"}, "abort"), "given the request up"),
}


@pytest.mark.parametrize(("reply", "said"), NONSENSE.values(), ids=list(NONSENSE))
def test_nonsense_is_an_error_and_never_an_empty_answer(reply: Any, said: str) -> None:
    with StandIn(faults=[(200, reply, {})] * 99) as server:
        message = refused(server, EngineError, in_flight=1)
        assert said in message and server.url in message
        assert len(server.bodies) == 1


def test_a_reply_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MOST_BYTES", 2**20)
    with StandIn(faults=[(200, b" " * 2**21, {})] * 9) as server:
        assert "more than 1 MiB" in refused(server, EngineError, in_flight=1)


# --- answers --------------------------------------------------------------------------------------

ANSWERS: dict[str, tuple[Any, str, str]] = {
    "plain": (reply_of({"content": " Sure. "}), "Sure.", "stop"),
    "empty": (reply_of({"content": ""}), "", "stop"),
    "null, of a model that ended at once": (reply_of({"content": None}, n_tokens=1), "", "stop"),
    "in parts": (reply_of({"content": [{"text": "Su"}, {"text": "re"}]}), "Sure", "stop"),
    "a refusal apart": (reply_of({"content": None, "refusal": "No."}), "No.", "stop"),
    "cut off": (reply_of({"content": "Sure, he"}, "length"), "Sure, he", "length"),
    "ended nobody knows how": (reply_of({"content": "Sure"}, None), "Sure", "unknown"),
    "a thought": (
        reply_of({"content": "\n\nSure", "reasoning_content": "Hm."}),
        "<think>Hm.</think>\n\nSure",
        "stop",
    ),
    "a thought by its newer name": (
        reply_of({"content": "Sure", "reasoning": "Hm."}),
        "<think>Hm.</think>Sure",
        "stop",
    ),
    "a thought that is cut off": (
        reply_of({"content": None, "reasoning_content": "Hm, he"}, "length"),
        "<think>Hm, he",
        "length",
    ),
}


@pytest.mark.parametrize(("reply", "text", "finish"), ANSWERS.values(), ids=list(ANSWERS))
def test_what_is_made_of_a_reply(reply: Any, text: str, finish: str) -> None:
    with StandIn(lambda body: reply) as server:
        (found,) = engine(server).generate(ASKED[:1], GREEDY)
    assert (found.text, found.finish) == (text, finish)
    assert found.n_tokens == reply["usage"]["completion_tokens"] and found.token_ids is None


PREFILLED: dict[str, tuple[str, dict[str, Any], str]] = {
    "goes on": ("Sure, ", {"content": "here is how"}, "Sure, here is how"),
    "sent back": ("Sure, ", {"content": "Sure, here is how"}, "Sure, here is how"),
    "an answer that is taken for a thought": (
        "Sure,",
        {"content": None, "reasoning_content": " here is how"},
        "Sure, here is how",
    ),
    "a thought that the prefill has opened": (
        "<think>Let me",
        {"content": "Sure", "reasoning_content": " see"},
        "<think>Let me see</think>Sure",
    ),
    "and that is cut off": (
        "<think>Let me",
        {"content": None, "reasoning_content": " see"},
        "<think>Let me see",
    ),
    "a thought after it": (
        "Sure,",
        {"content": "here", "reasoning_content": "Hm"},
        "Sure,<think>Hm</think>here",
    ),
}


@pytest.mark.parametrize(("prefill", "message", "text"), PREFILLED.values(), ids=list(PREFILLED))
def test_what_follows_a_prefill(prefill: str, message: dict[str, Any], text: str) -> None:
    with StandIn(lambda body: reply_of(message)) as server:
        (found,) = engine(server).generate([Conversation.of("q", prefill=prefill)], GREEDY)
    assert found.text == text


def test_stop_texts_that_a_server_does_not_know() -> None:
    with StandIn(honours_stop=False) as server:
        asked = [Conversation.of("q", prefill="end of "), *ASKED[:1]]
        found = list(engine(server).generate(asked, Sampling(stop=("seed", "end of"))))
    assert [one.text for one in found] == ["end of  says: q", "says: question 0"]
    assert {one.finish for one in found} == {"stop"}


def test_conversations_that_a_guard_judges() -> None:
    judged = ASKED[0].answered("Sure, here is how.")
    with StandIn() as server:
        with pytest.raises(InputError, match="ends with the turn of the assistant"):
            engine(server).generate([judged], GREEDY)
        list(engine(server, answers_assistant_turns=True).generate([judged, ASKED[1]], GREEDY))
    first, second = sorted(server.bodies, key=lambda body: -len(body["messages"]))
    assert first["messages"][-1] == {"role": "assistant", "content": "Sure, here is how."}
    assert (first["add_generation_prompt"], first["continue_final_message"]) == (True, False)
    assert "add_generation_prompt" not in second


# --- scores ---------------------------------------------------------------------------------------


def with_log_probs(*told: tuple[str, float]) -> Any:
    top = [{"token": token, "logprob": value} for token, value in told]
    reply = reply_of({"content": "Yes"}, "length", 1)
    reply["choices"][0]["logprobs"] = {"content": [{"token": "Yes", "top_logprobs": top}]}
    return reply


def test_scores_are_read_from_the_likeliest_tokens() -> None:
    told = with_log_probs(("No", -2.0), (" Yes", -0.2), ("Yes", -3.0), ("Un", -4.0), ("U", -5.0))
    with StandIn(lambda body: told) as server:
        own = engine(server)
        found = own.log_probs(ASKED[:3], ("Yes", "No", "Unsafe", "Maybe"))
    assert isinstance(own, Engine) and isinstance(own, TokenScorer)
    np.testing.assert_array_equal(found, [[-0.2, -2.0, -4.0, -np.inf]] * 3)
    (body, *_), keys = server.bodies, ("logprobs", "top_logprobs", "max_tokens", "temperature")
    assert [body[key] for key in keys] == [True, 20, 1, 1.0]


def test_candidates_that_cannot_be_told_apart() -> None:
    with StandIn(lambda body: with_log_probs(("Sa", -1.0))) as server:
        with pytest.raises(
            InputError, match=r"'Safe' and 'Sad' begin with the same token \('Sa'\)"
        ):
            engine(server).log_probs(ASKED[:1], ("Safe", "Sad"))
        with pytest.raises(InputError, match="'Yes' and 'Yesterday' begins the other"):
            engine(server).log_probs(ASKED[:1], ("Yes", "Yesterday"))
        with pytest.raises(InputError, match="at least one text"):
            engine(server).log_probs(ASKED[:1], ())


@pytest.mark.parametrize("logprobs", [None, {}, {"content": []}, {"content": [{"token": "Yes"}]}])
def test_a_server_that_tells_no_scores(logprobs: Any) -> None:
    reply = reply_of({"content": "Yes"})
    reply["choices"][0]["logprobs"] = logprobs
    with (
        StandIn(lambda body: reply) as server,
        pytest.raises(EngineError, match="tells no log-probabilities"),
    ):
        engine(server).log_probs(ASKED[:1], ("Yes", "No"))


# --- the first look -------------------------------------------------------------------------------


def test_nothing_listens() -> None:
    with StandIn() as server:
        url = server.url
    with pytest.raises(EngineError, match=f"{url} cannot be reached .*; check that it runs"):
        list(ServerEngine(url, "tiny").generate(ASKED, GREEDY))


def test_another_model_is_served() -> None:
    with StandIn(models=["large", "larger"]) as server:
        with pytest.raises(InputError, match="no model 'tiny'; it has large, larger"):
            list(engine(server).generate(ASKED, GREEDY))
        assert server.bodies == []


def test_a_server_without_a_list_of_models() -> None:
    with StandIn(models=None) as server:
        assert len(list(engine(server).generate(ASKED[:2], GREEDY))) == 2


def test_a_server_whose_address_cannot_be_looked_up() -> None:
    with pytest.raises(EngineError, match="cannot be reached"):
        ServerEngine("http://nowhere.invalid/v1", "tiny").check()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:8000/v1", "expected one such as http"),
        ("ftp://localhost/v1", "expected one such as http"),
        ("http://", "expected one such as http"),
        ("http://h:99999/v1", "expected one such as http"),
        ("http://me:secret@h/v1", "a name or a password"),
        ("http://h/v1?key=secret", "holds a"),
    ],
)
def test_addresses_that_are_none(url: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ServerEngine(url, "tiny")


def test_addresses_that_say_too_much() -> None:
    for url in ("http://h/v1/", " http://h/v1/chat/completions"):
        assert ServerEngine(url, "tiny")._transport.url == "http://h/v1"


@pytest.mark.parametrize(
    "settings",
    [
        {"in_flight": 0},
        {"timeout_seconds": 0.0},
        {"timeout_seconds": float("inf")},
        {"retries": -1},
    ],
)
def test_numbers_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected at least 1, more than 0 and at least 0"):
        ServerEngine("http://h/v1", "tiny", **settings)


def test_a_key_that_cannot_be_sent() -> None:
    with pytest.raises(InputError, match="API key holds a blank") as caught:
        ServerEngine("http://h/v1", "tiny", api_key="sk-ver y\nsecret")
    assert "secret" not in str(caught.value)


def test_nobody_logs_the_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with StandIn(faults=[500]) as server:
        own = engine(server)
        list(own.generate(ASKED[:2], GREEDY))
        assert KEY not in f"{own.identity} {own.name} {own!r} {json.dumps(own.identity)}"
    assert KEY not in caplog.text
    other = engine(server, template_kwargs={"enable_thinking": False})
    assert other.identity != own.identity


def test_half_characters() -> None:
    with StandIn(lambda body: reply_of({"content": "a \ud83d b \ud83d\ude00"})) as server:
        with pytest.raises(InputError, match="half a character"):
            engine(server).generate([Conversation.of("a \ud83d")], GREEDY)
        (found,) = engine(server).generate(ASKED[:1], GREEDY)
    assert found.text == "a � b \U0001f600"
