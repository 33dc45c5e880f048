"""The engine asks vLLM in vLLM's own words; a small module stands in for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import fake_vllm
import pytest

from nest.conversations.conversation import Conversation
from nest.errors import EngineError, InputError
from nest.generation import vllm as engine_module
from nest.generation.sampling import GREEDY, Sampling
from nest.generation.vllm import VllmEngine

ASKED = [Conversation.of(f"question {i}") for i in range(5)]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm.module())
    yield


def test_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match="pip install vllm"):
        VllmEngine("folder")


def test_what_vllm_is_told(installed: None) -> None:
    engine = VllmEngine("folder", revision="abc", dtype="bfloat16", max_model_len=99)
    (llm,) = fake_vllm.LLM.made
    assert llm.settings == ("folder", "abc", "bfloat16", 99)
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=5, n=2, stop=("x",), max_new_tokens=9)
    list(engine.generate(ASKED[:2], sampling))
    list(engine.generate([Conversation.of("q", system="no", prefill="Sure")], GREEDY))
    drawn, greedy = llm.calls
    assert [turns[0]["content"] for turns in drawn["messages"]] == [
        f"question {i // 2}" for i in range(4)
    ]
    first, *others = drawn["params"]
    assert (first.temperature, first.top_p, first.top_k, first.n) == (0.7, 0.9, 5, 1)
    assert (first.stop, first.max_tokens, drawn["use_tqdm"]) == (["x"], 9, False)
    assert len({params.seed for params in [first, *others]}) == 4
    (params,) = greedy["params"]
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.0, 1.0, -1, None)
    assert [turn["role"] for turn in greedy["messages"][0]] == ["system", "user", "assistant"]


def test_tokens_are_counted_without_the_one_that_ends_an_answer(installed: None) -> None:
    (whole,) = VllmEngine("folder").generate(ASKED[:1], GREEDY)
    (cut,) = VllmEngine("folder").generate(ASKED[:1], Sampling(max_new_tokens=3))
    assert (whole.n_tokens, whole.finish) == (12, "stop")
    assert whole.token_ids is not None and fake_vllm.EOS not in whole.token_ids
    assert (cut.n_tokens, cut.finish) == (3, "length")
    assert whole.text.startswith(cut.text) and not whole.text.startswith(" ")


def test_a_thought_that_the_template_opens_is_opened_in_the_text(installed: None) -> None:
    engine = VllmEngine("folder", template_kwargs={"thinks": True})
    answer, begun = engine.generate([ASKED[0], Conversation.of("q", prefill="Sure")], GREEDY)
    assert answer.text.startswith("<think>w") and begun.text.startswith("Sure w")


def test_many_answers_are_asked_for_in_parts(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "ASKED_AT_ONCE", 4)
    calls: list[tuple[str, int, int]] = []
    engine = VllmEngine("folder", progress=lambda *call: calls.append(call))
    asked = [*ASKED, Conversation.of("q", prefill="Sure")]
    found = list(engine.generate(asked, Sampling(temperature=1.0, n=2), skip={(0, 0), (0, 1)}))
    assert [(one.conversation, one.sample) for one in found] == [
        (i, j) for i in range(1, 6) for j in range(2)
    ]
    assert [done for _, done, _ in calls] == [6, 10, 12]


def test_what_vllm_refuses_and_how_it_fails(installed: None) -> None:
    with pytest.raises(InputError, match="vLLM refuses 'folder': unknown dtype float7"):
        VllmEngine("folder", dtype="float7")
    with pytest.raises(InputError, match=r"vLLM refuses 'folder': .*sizes"):
        VllmEngine("folder", sizes=3)
    engine = VllmEngine("folder")
    (llm,) = fake_vllm.LLM.made
    llm.fault = ValueError("The prompt has 9\nwords too many")
    with pytest.raises(InputError, match="refuses a conversation: The prompt has 9 words"):
        list(engine.generate(ASKED, GREEDY))
    llm.fault = RuntimeError("out of memory")
    with pytest.raises(EngineError, match=r"vLLM failed: out of memory; .*max_model_len"):
        list(engine.generate(ASKED, GREEDY))


def test_an_answer_that_was_given_up(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = fake_vllm.CompletionOutput("", [], "abort")
    monkeypatch.setattr(fake_vllm, "_said", lambda turns, params: given_up)
    with pytest.raises(EngineError, match="gave up the answer to 'question 0'"):
        list(VllmEngine("folder").generate(ASKED, GREEDY))


def test_identity_tells_settings_apart(installed: None) -> None:
    same = {VllmEngine("folder").identity, VllmEngine("folder").identity}
    others = {
        VllmEngine("other").identity,
        VllmEngine("folder", dtype="bfloat16").identity,
        VllmEngine("folder", template_kwargs={"thinks": True}).identity,
        VllmEngine("folder", system="no").identity,
    }
    assert len(same) == 1 and len(same | others) == 5
