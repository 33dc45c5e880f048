"""Judgements on disk: asked once, shared by processes, and never a reason to fail."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nest.artifacts.storage import in_turn
from nest.conversations.conversation import Conversation
from nest.judging.cache import Cached, default_folder, key_of
from nest.judging.judge import Exchange, Judgement, Verdict


class Counting:
    """Says of an answer what it is long, and counts what it is asked."""

    name = "counting"

    def __init__(self, sha256: str = "a" * 64, verdict: Verdict = Verdict.COMPLIED) -> None:
        self.sha256, self.verdict = sha256, verdict
        self.asked: list[Exchange] = []

    def judge(self, exchanges: list[Exchange]) -> list[Judgement]:
        self.asked += exchanges
        return [
            Judgement(self.verdict, len(one.response) / 100, "S1", f"sagt „{one.response}“\n")
            for one in exchanges
        ]


def exchanges(*responses: str) -> list[Exchange]:
    return [Exchange(Conversation.of("p"), response) for response in responses]


def file_of(folder: Path, judge: Counting) -> Path:
    return folder / f"{judge.sha256}.jsonl"


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    judge = Counting()
    first = Cached(judge, tmp_path / "new" / "folder").judge(exchanges("a", "bb", "a"))
    assert len(judge.asked) == 2 and first == Counting().judge(exchanges("a", "bb", "a"))
    again = Cached(judge, tmp_path / "new" / "folder")
    assert again.judge(exchanges("bb", "ccc", "a")) == Counting().judge(exchanges("bb", "ccc", "a"))
    assert [one.response for one in judge.asked] == ["a", "bb", "ccc"]
    assert again.judge([]) == []


def test_another_judge_and_other_exchanges_are_asked(tmp_path: Path) -> None:
    one, other = Counting(), Counting("b" * 64)
    for judge in (one, other):
        Cached(judge, tmp_path).judge(exchanges("a"))
    assert len(one.asked) == len(other.asked) == 1
    asked = Conversation.of("p")
    different = [
        Exchange(asked, "a"),
        Exchange(asked, "a", harmless=True),
        Exchange(asked, "a", reference="r"),
        Exchange(Conversation.of("p", system="s"), "a"),
        Exchange(Conversation.of("p", prefill="a"), "a"),
        Exchange(Conversation.of("q"), "a"),
        Exchange(asked, "b"),
    ]
    assert len({key_of(exchange) for exchange in different}) == len(different)
    assert key_of(Exchange(Conversation.of("p"), "a")) == key_of(different[0])


def test_unparsed_is_asked_again(tmp_path: Path) -> None:
    judge = Counting(verdict=Verdict.UNPARSED)
    cached = Cached(judge, tmp_path)
    for _ in range(2):
        assert cached.judge(exchanges("a", "a"))[0].verdict is Verdict.UNPARSED
    assert len(judge.asked) == 2


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    """Cut at any byte or marred anywhere: what can be read is right, and the rest is judged anew."""
    said = exchanges(*(f"answer {i}" for i in range(6)))
    expected = Counting().judge(said)
    Cached(Counting(), tmp_path).judge(said)
    file = file_of(tmp_path, Counting())
    whole = file.read_bytes()
    draw = random.Random(0)
    contents = [whole[:cut] for cut in range(0, len(whole), 17)]
    contents += [
        b"\x00" * 999,
        b"[" * 100_000 + b"\n",
        b'{"key": 1}\n' + whole,
        b"null\n[]\n\xff\n",
    ]
    for _ in range(60):
        marred = bytearray(whole)
        marred[draw.randrange(len(whole))] = draw.choice(b"{}\x00\nx\xff")
        contents.append(bytes(marred))
    for content in contents:
        file.write_bytes(content)
        judge = Counting()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = Cached(judge, tmp_path).judge(said)
        assert [one.verdict for one in found] == [one.verdict for one in expected]
        if judge.asked and content.strip():
            assert not warned or "are damaged and left out" in str(warned[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = Counting()
            Cached(again, tmp_path).judge(said)
        assert again.asked == []  # what was judged anew was kept, behind a line that was cut


@pytest.mark.parametrize(
    "entry",
    [
        {"verdict": "safe", "score": None, "category": None, "said": ""},
        {"verdict": "refused", "score": "0.5", "category": None, "said": ""},
        {"verdict": "refused", "score": True, "category": None, "said": ""},
        {"verdict": "refused", "score": None, "category": 3, "said": ""},
        {"verdict": "refused", "score": None, "category": None, "said": None},
        {"verdict": "refused"},
        "refused",
    ],
)
def test_an_entry_that_is_no_judgement(tmp_path: Path, entry: object) -> None:
    (one,) = exchanges("a")
    line = json.dumps({"key": key_of(one), "judgement": entry})
    file_of(tmp_path, Counting()).write_text(line + "\n")
    judge = Counting()
    with pytest.warns(UserWarning, match="1 lines of .* are damaged"):
        assert Cached(judge, tmp_path).judge([one])[0].verdict is Verdict.COMPLIED
    assert len(judge.asked) == 1


def test_a_folder_that_cannot_be_had(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    judge = Counting()
    cached = Cached(judge, blocked)
    with pytest.warns(UserWarning, match="cannot be (kept|read)"):
        assert cached.judge(exchanges("a"))[0].verdict is Verdict.COMPLIED
    assert cached.judge(exchanges("a")) and len(judge.asked) == 1


WRITER = """
import sys
sys.path.insert(0, {here!r})
from test_cache import Counting, exchanges
from nest.judging.cache import Cached
for i in range(200):
    Cached(Counting(), {folder!r}).judge(exchanges(f"answer {{i}}", f"{{sys.argv[1]}} {{i}}" * 50))
"""


def test_two_processes_at_once(tmp_path: Path) -> None:
    code = WRITER.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    running = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code, name]) for name in ("x", "y")
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    judge = Counting()
    said = exchanges(
        *(f"answer {i}" for i in range(200)),
        *(f"{name} {i}" * 50 for name in ("x", "y") for i in range(200)),
    )
    Cached(judge, tmp_path).judge(said)
    assert judge.asked == []


def test_a_reader_waits_for_a_writer(tmp_path: Path) -> None:
    """Half of a line is what another process is just writing, and not damage."""
    said = exchanges("answer")
    Cached(Counting(), tmp_path).judge(said)
    file = file_of(tmp_path, Counting())
    content = file.read_bytes()
    judge = Counting()
    with ThreadPoolExecutor(1) as pool:
        with file.open("wb", buffering=0) as writer, in_turn(writer.fileno(), alone=True):
            writer.write(content[:40])
            reading = pool.submit(Cached(judge, tmp_path).judge, said)
            with pytest.raises(TimeoutError):
                reading.result(timeout=0.3)
            writer.write(content[40:])
        assert reading.result(timeout=30)[0].verdict is Verdict.COMPLIED
    assert judge.asked == []


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "nest" / "judgements"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "nest" / "judgements"
