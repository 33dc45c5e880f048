"""Prompt files as other programs write them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from nest.errors import InputError
from nest.prompts.attacks import load_templates
from nest.prompts.prompt_set import from_values, load_prompts, text_columns


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- columns that belong to the prompt ------------------------------------------------------------


def test_alpacas_input_stands_under_the_instruction(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Translate.", "input": "two words", "output": "a"},
        {"instruction": "Say hello.", "input": "", "output": "b"},
    ]
    found = load_prompts(jsonl(tmp_path / "alpaca.jsonl", *rows))
    assert found.prompts == ("Translate.\n\ntwo words", "Say hello.")
    assert found.responses == ("a", "b")


def test_harmbenchs_context_stands_before_the_behaviour(tmp_path: Path) -> None:
    file = tmp_path / "b.csv"
    file.write_text("Behavior,ContextString\nSum it up,A text\nTell me,\n")
    assert load_prompts(file).prompts == ("A text\n\nSum it up", "Tell me")


@pytest.mark.parametrize(
    ("column", "value"),
    [("input", "x"), ("choices", ["a", "b"]), ("history", [["a", "b"]])],
)
def test_another_column_that_may_belong_to_it_is_warned_of(
    tmp_path: Path, column: str, value: Any
) -> None:
    file = jsonl(
        tmp_path / "p.jsonl", {"prompt": "a", column: value}, {"prompt": "b", column: None}
    )
    with pytest.warns(UserWarning, match=rf"the column {column} has something in 1 of 2 rows"):
        load_prompts(file)
    empty = jsonl(tmp_path / "e.jsonl", {"prompt": "a", column: None}, {"prompt": "b", column: ""})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_prompts(empty)


def test_a_column_chosen_by_hand_is_taken_alone_and_the_other_warned_of(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "p.jsonl", {"instruction": "a", "input": "b"})
    with pytest.warns(UserWarning, match="the column input"):
        assert load_prompts(f"{file}:instruction").prompts == ("a",)


def test_the_responses_column_can_be_chosen(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "b.jsonl", {"prompt": "p", "q": "q", "output": "yes", "refusal": "no"})
    assert load_prompts(file).responses == ("yes",)
    assert load_prompts(f"{file}::refusal", True).dialogues() == (("p", "no"),)
    assert load_prompts(f"{file}:q:refusal", True).dialogues() == (("q", "no"),)
    assert set(text_columns(file)) == {"prompt", "q", "output", "refusal"}
    with pytest.raises(InputError, match="no column 'gone'"):
        load_prompts(f"{file}::gone")
    with pytest.raises(InputError, match="ends in a colon"):
        load_prompts(f"{file}:q:")


# --- characters, line ends, lengths ---------------------------------------------------------------


@pytest.mark.parametrize("key", ["prompt", "response"])
def test_half_a_character_is_named_by_line(tmp_path: Path, key: str) -> None:
    good = {"prompt": "a", "response": "b"}
    file = jsonl(tmp_path / "p.jsonl", good, {**good, key: "cut \ud83d"})
    with pytest.raises(InputError, match=rf"p\.jsonl, line 2: {key} holds half a character"):
        load_prompts(file, True)
    with pytest.raises(InputError, match="item 1: prompt holds half"):
        from_values(["cut \ud83d"])
    attack = jsonl(tmp_path / "a.jsonl", {"name": "x", "template": "{prompt} \ud83d"})
    with pytest.raises(InputError, match="holds half a character"):
        load_templates(attack)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
def test_any_line_end_and_a_byte_order_mark_anywhere(tmp_path: Path, end: str) -> None:
    # two files of Notepad's put one behind the other
    (tmp_path / "p.txt").write_bytes(f"\ufeffone{end}\ufefftwo{end}".encode())
    (tmp_path / "p.csv").write_bytes(f'\ufeffprompt{end}one{end}"two"{end}'.encode())
    lines = f'\ufeff{{"prompt": "one"}}{end}{end}\ufeff{{"prompt": "two"}}'
    (tmp_path / "p.jsonl").write_bytes(lines.encode())
    for name in ("p.txt", "p.csv", "p.jsonl"):
        assert load_prompts(tmp_path / name).prompts == ("one", "two"), name


def test_a_field_of_any_length(tmp_path: Path) -> None:
    import csv

    bound = csv.field_size_limit()
    (tmp_path / "p.csv").write_text(f"prompt\n{'long ' * 60_000}\n")
    assert len(load_prompts(tmp_path / "p.csv").prompts[0]) == 300_000
    assert csv.field_size_limit() == bound


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_another_separator_is_told_by_its_name(tmp_path: Path, separator: str, name: str) -> None:
    with_commas = f"prompt{separator}response\na, b{separator}c\n"
    for content in (with_commas, f"id{separator}prompt\n1{separator}a\n"):
        (tmp_path / "p.csv").write_text(content)
        with pytest.raises(InputError, match=f"written with {name}"):
            load_prompts(f"{tmp_path / 'p.csv'}:prompt")
