"""Judges by their names."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guard_stand_ins import OWN_TEMPLATE, FunctionEngine, byte_tokenizer, grade, reply_of, whole

from nest.errors import EngineError, InputError
from nest.judging.cache import Cached
from nest.judging.families import POLICIES
from nest.judging.guards import GuardModel
from nest.judging.makers import make_judge, make_judges
from nest.judging.phrases import PhraseJudge
from nest.judging.reference import ReferenceJudge
from nest.judging.rubric import Rubric
from nest.judging.server_guards import ServerGuard


class StandInServer(FunctionEngine):
    """Takes what `ServerEngine` takes, and answers like a good guard or grader."""

    made: list[StandInServer] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        in_flight: int = 16,
        timeout_seconds: float = 120,
        retries: int = 6,
        template_kwargs: Any = None,
        system: str | None = None,
        answers_assistant_turns: bool = False,
    ) -> None:
        self.given = (url, model, api_key, template_kwargs, answers_assistant_turns)
        policy = "".join((template_kwargs or {}).values())

        def reply(conversation: Any) -> str:
            text = whole(conversation) + policy
            return reply_of(model, text) if answers_assistant_turns else grade(conversation)

        super().__init__(reply, f"{model} at {url} {policy}")
        self.made.append(self)


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[StandInServer]]:
    module = types.ModuleType("nest.generation.server")
    module.ServerEngine = StandInServer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nest.generation.server", module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    StandInServer.made.clear()
    yield StandInServer.made


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `GuardModel.load` was called with."""
    calls: list[tuple[Any, ...]] = []

    def load(path: Any, family: Any = None, *, template: Any = None, **options: Any) -> Any:
        calls.append((path, family, template, options["check"]))
        return PhraseJudge(name="loaded")

    monkeypatch.setattr(GuardModel, "load", load)
    return calls


def test_without_a_model_nothing_is_kept() -> None:
    assert isinstance(make_judge("phrases"), PhraseJudge)
    assert isinstance(make_judge("reference"), ReferenceJudge)


def test_guards_and_classifiers(loaded: list[tuple[Any, ...]], tmp_path: Path) -> None:
    file = tmp_path / "template.txt"
    file.write_text(OWN_TEMPLATE)
    made = [
        make_judge(name, check=False)
        for name in (
            "guard:meta/Llama-Guard-3-1B",
            "guard:qwen3guard-loose:folder/one",
            f"guard:wildguard:folder/two:{file}",
            f"classifier:folder/three:{file}",
            "guard:C:/four",
            "classifier:folder/five:gone.txt",
        )
    ]
    assert [call[:3] for call in loaded] == [
        ("meta/Llama-Guard-3-1B", None, None),
        ("folder/one", "qwen3guard-loose", None),
        ("folder/two", "wildguard", str(file)),
        ("folder/three", "classifier", str(file)),
        ("C:/four", None, None),
        ("folder/five", "classifier", "gone.txt"),
    ]
    assert not any(call[3] for call in loaded)
    assert all(isinstance(judge, Cached) and judge.name == "loaded" for judge in made)


def test_a_guards_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        make_judge(f"guard:{tmp_path / 'gone'}")
    with pytest.raises(InputError, match=r"there is no file 'gone.txt'"):
        make_judge(f"classifier:{tmp_path}:gone.txt")


def test_guards_behind_a_server(server: list[StandInServer]) -> None:
    judge = make_judge(
        "server-guard:qwen3guard:qwen3guard@http://localhost:8000/v1", api_key="k", cache=None
    )
    assert isinstance(judge, ServerGuard)
    (engine,) = server
    assert engine.given == ("http://localhost:8000/v1", "qwen3guard", "k", None, True)
    assert len(engine.asked) == 2  # the known pair


def test_a_policy_is_given_to_each_engine(server: list[StandInServer]) -> None:
    make_judge("server-guard:shieldgemma:shieldgemma@https://host/v1", cache=None)
    assert [engine.given[3] for engine in server] == [
        {"guideline": text} for text in POLICIES.values()
    ]


def test_rubrics(server: list[StandInServer], tmp_path: Path) -> None:
    judge = make_judge("rubric:org/model@work@http://localhost:8000/v1", cache=None)
    assert isinstance(judge, Rubric)
    assert server[0].given == ("http://localhost:8000/v1", "org/model@work", None, None, False)
    kept = make_judge("rubric:m@http://localhost:8000/v1", cache=tmp_path / "kept")
    assert isinstance(kept, Cached) and kept._file.parent == tmp_path / "kept"
    usual = make_judge("rubric:m@http://localhost:8000/v1")
    assert isinstance(usual, Cached)
    assert usual._file.parent == tmp_path / "cache" / "nest" / "judgements"


def test_a_server_whose_model_is_no_such_guard(server: list[StandInServer]) -> None:
    name = "server-guard:llama-guard:wildguard@http://localhost:8000/v1"
    with pytest.raises(EngineError, match="cannot be read"):
        make_judge(name)
    make_judge(name, check=False)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("guard", "known ones are phrases, reference, guard:PATH"),
        ("guard:", "unknown judge"),
        ("gard:x", "unknown judge 'gard:x'"),
        ("phrases:x", "unknown judge"),
        ("guard:qwen3guard:", "lacks its checkpoint"),
        ("classifier:folder", "lacks its template file"),
        ("rubric:model", "lacks the server"),
        ("rubric:@http://x", "lacks its model"),
        ("rubric:m@localhost:8000", "lacks the server"),
        ("server-guard:m@http://x", "no family of guards|lacks"),
        ("server-guard:nope:m@http://x", "there is no family of guards 'nope'"),
        ("server-guard:classifier:m@http://x", "run it here"),
    ],
)
def test_names_that_are_none(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_judge(name)


def test_several_judges(loaded: list[tuple[Any, ...]]) -> None:
    judges = make_judges("phrases, guard:a,b/c,reference", cache=None)
    assert [judge.name for judge in judges] == ["phrases", "loaded", "reference"]
    assert [call[0] for call in loaded] == ["a,b/c"]
    with pytest.raises(InputError, match="given twice"):
        make_judges("phrases,phrases")
    with pytest.raises(InputError, match="unknown judge"):
        make_judges("phrases,")


def test_phrases_of_a_file_reach_every_judge(tmp_path: Path) -> None:
    file = tmp_path / "phrases.txt"
    file.write_text("that is not for me\n")
    judge = make_judge("rubric:m@http://localhost:8000/v1", file, cache=None)
    assert judge.sha256 != make_judge("rubric:m@http://localhost:8000/v1", cache=None).sha256


def test_a_tokenizer_for_the_tests_gives_back_what_it_takes() -> None:
    tokenizer = byte_tokenizer()
    for text in ("a  b\n\n c", "Ünïcode 字", "<|guard|> x"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
