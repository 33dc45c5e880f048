"""Chats as other tools write them."""

import json
from pathlib import Path
from typing import Any

import pytest

from nest.conversations.conversation import Conversation
from nest.errors import InputError
from nest.prompts.attacks import TemplateAttack, attacked
from nest.prompts.prompt_set import PromptSet, from_values, load_prompts

USER, SAID = {"role": "user", "content": "how"}, {"role": "assistant", "content": "so"}
SYSTEM, MORE = {"role": "system", "content": "be kind"}, {"role": "user", "content": "and then"}
LAST = {"role": "assistant", "content": "thus"}
WHOLE = [SYSTEM, USER, SAID, MORE, LAST]


def read(folder: Path, *rows: Any, spec: str = "", need_response: bool = False) -> PromptSet:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(f"{path}{spec}", need_response)


def sharegpt(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    sides = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": sides[turn["role"]], "value": turn["content"]} for turn in turns]


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("row", "spec"),
    [
        ({"messages": WHOLE}, ""),
        ({"conversations": sharegpt(WHOLE)}, ""),
        ({"prompt": "how", "messages": WHOLE}, ""),  # UltraChat, no_robots
        ({"prompt": "x", "response": "y", "messages": WHOLE}, ":messages"),
        ({"chosen": WHOLE, "rejected": [USER, SAID]}, ":chosen"),
        ({"prompt": WHOLE[:-1], "completion": [LAST]}, ""),  # TRL's prompt-completion
        ({"prompt": WHOLE[:-1], "chosen": [LAST], "rejected": [SAID]}, ":prompt:chosen"),
        ({"prompt": WHOLE[:-1], "chosen": WHOLE}, ":prompt:chosen"),
        ({"prompt": WHOLE[:-1], "completion": "thus"}, ""),
        (
            {
                "messages": [
                    {**turn, "content": [{"type": "text", "text": turn["content"]}]}
                    for turn in WHOLE
                ]
            },
            "",
        ),
    ],
)
def test_every_form_is_the_same_conversation(tmp_path: Path, row: Any, spec: str) -> None:
    found = read(tmp_path, row, row, spec=spec, need_response=True)
    asked = Conversation.from_messages(WHOLE[:-1])
    assert found.chats() == ((asked, "thus"),) * 2
    assert found.dialogues() == (("and then", "thus"),) * 2
    assert found.n_duplicates == 1
    same = from_values([(asked, "thus")] * 2)
    assert same.sha256 == found.sha256


def test_plain_rows_are_one_user_turn(tmp_path: Path) -> None:
    plain = read(tmp_path, {"messages": [USER, SAID]})
    assert plain.conversations == (Conversation.of("how"),)
    assert plain.sha256 == from_values([("how", "so")]).sha256
    assert read(tmp_path, {"messages": [USER]}, {"messages": [USER, SAID]}).responses is None
    assert (
        read(tmp_path, {"prompt": "how", "messages": [USER, SAID]}, spec=":prompt").responses
        is None
    )


def test_a_column_of_system_prompts_is_the_system_turn(tmp_path: Path) -> None:
    rows = [{"system_prompt": "be kind", "question": "how", "response": "so"}]
    rows.append({"system_prompt": "", "question": "how", "response": "so"})
    first, second = read(tmp_path, *rows).conversations
    assert (first.system, second.system) == ("be kind", None)
    assert first.asked == "how"


def test_an_attack_changes_what_the_user_says_last() -> None:
    asked = Conversation.from_messages(WHOLE[:-1])
    changed = attacked(TemplateAttack("magic", "please {prompt}"), asked)
    assert changed.asked == "please and then"
    assert changed.turns[:3] == asked.turns[:3]


@pytest.mark.parametrize(
    ("row", "spec", "said"),
    [
        ({"messages": "hello"}, "", "expected a list of turns"),
        ({"messages": [USER, "x"]}, "", "expected a list of turns"),
        ({"messages": [SAID]}, "", "no turn of a user"),
        ({"conversations": [{"from": "wizard", "value": "x"}]}, "", "known sides are"),
        ({"messages": [USER]}, "", "response is None"),
        ({"prompt": [USER, SAID], "completion": "x"}, "", "expected a user turn"),
        ({"prompt": [USER], "completion": [MORE]}, "", "expected the assistant's turn"),
        ({"prompt": [USER], "completion": [MORE, SAID]}, "", "expected the assistant's turn"),
        ({"messages": [{"role": "user", "content": "\ud800"}, SAID]}, "", "half a character"),
    ],
)
def test_what_cannot_be_read_names_the_row(tmp_path: Path, row: Any, spec: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read(tmp_path, row, spec=spec, need_response=True)
    assert "chats.jsonl, line 1" in str(caught.value)
