"""Harmful dialogues must refuse, benign ones must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nest.errors import InputError
from nest.judging.phrases import PhraseJudge, phrase_judge
from nest.judging.refusals import check_responses, count_refusals
from nest.prompts.prompt_set import PromptSet, from_values, load_prompts

REFUSAL, ANSWER = "I'm sorry, I can't help with that.", "Sure, here it is."


def a_set(n_refusals: int, n: int = 20, name: str = "p") -> PromptSet:
    pairs = [(f"{name} {i}", REFUSAL if i < n_refusals else ANSWER) for i in range(n)]
    return from_values(pairs, name)


def check(harmful: PromptSet, benign: PromptSet, **more: object) -> list[str]:
    told: list[str] = []
    check_responses(harmful, benign, PhraseJudge(), warn=told.append, **more)
    return told


def test_the_counts_are_told() -> None:
    notices: list[str] = []
    assert check(a_set(20), a_set(0, name="b"), notice=notices.append) == []
    assert notices == [
        "responses: 20 of 20 to harmful prompts are refusals, 0 of 20 to benign ones"
    ]
    assert count_refusals(a_set(3), PhraseJudge()).share == 3 / 20


@pytest.mark.parametrize(
    ("refused", "answered", "said"),
    [(17, 0, "only 17 of 20"), (20, 4, "4 of 20 responses in b are refusals")],
)
def test_unusual_counts_are_warned_of(refused: int, answered: int, said: str) -> None:
    (told,) = check(a_set(refused), a_set(answered, name="b"))
    assert said in told


@pytest.mark.parametrize(
    ("refused", "answered", "said"),
    [(9, 0, "trained to comply"), (20, 11, "trained to refuse harmless")],
)
def test_the_wrong_way_round_is_refused(refused: int, answered: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check(a_set(refused), a_set(answered, name="b"))


def test_another_column_that_refuses_is_named(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "output": ANSWER, "llama3_output": REFUSAL} for i in range(6)]
    file = tmp_path / "breakers.json"
    file.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"llama3_output does refuse.*FILE::llama3_output"):
        check(load_prompts(file), a_set(0, name="b"), source=file)
    assert check(load_prompts(f"{file}::llama3_output"), a_set(0, name="b")) == []


def test_refusals_in_other_words_are_known_by_a_file(tmp_path: Path) -> None:
    file = tmp_path / "phrases.txt"
    file.write_bytes("\ufeffdas geht nicht\r\nlieber nicht\r\n".encode())
    harmful = from_values([("a", "Das geht nicht."), ("b", "Lieber nicht.")])
    with pytest.raises(InputError, match="--refusal-phrases"):
        check(harmful, a_set(0))
    check_responses(harmful, a_set(0), phrase_judge(file), warn=pytest.fail)


def test_the_same_prompts_to_opposite_ends() -> None:
    same = from_values([(prompt, ANSWER) for prompt in a_set(20).prompts], "b")
    with pytest.raises(InputError, match="20 prompts are both in p"):
        check(a_set(20), same)
    some = from_values([*same.dialogues()[:2], *((f"x{i}", ANSWER) for i in range(9))], "b")
    (told,) = check(a_set(20), some)
    assert "2 prompts are both" in told
