"""Files of every format give the same prompts, and bad ones their sentence."""

import json
import sys
import types

import pytest

from nest.errors import InputError, MissingInputError
from nest.prompts.prompt_set import from_values, load_pairs, load_prompts

ROWS = [("How?", 'Like this, "so".'), ("Why,\nthen?", "Da‐rum."), ("How?", "Again.")]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return str(path)


def all_formats(folder):
    import csv

    import pyarrow
    import pyarrow.parquet

    objects = [{"prompt": p, "response": r} for p, r in ROWS]
    yield write(folder / "a.json", json.dumps(objects))
    yield write(folder / "a.jsonl", "\n".join(json.dumps(row) for row in objects) + "\n\n")
    with (folder / "a.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("Prompt", "OUTPUT"), *ROWS])
    yield str(folder / "a.csv")
    table = pyarrow.table({"goal": [p for p, _ in ROWS], "completion": [r for _, r in ROWS]})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    yield str(folder / "a.parquet")
    turns = [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r}]}
        for p, r in ROWS
    ]
    yield write(folder / "chat.jsonl", "\n".join(json.dumps(row) for row in turns))


def test_formats_agree_in_content_and_hash(tmp_path):
    expected = from_values(ROWS)
    for spec in all_formats(tmp_path):
        found = load_prompts(spec, need_response=True)
        assert found.dialogues() == tuple(ROWS), spec
        assert found.sha256 == expected.sha256, spec


def test_hash_tells_content_and_boundaries_apart():
    assert from_values(["ab", "c"]).sha256 != from_values(["a", "bc"]).sha256
    assert from_values(["a", "b"]).sha256 != from_values([("a", "b")]).sha256


def test_duplicates_are_kept_and_counted():
    found = from_values(["a", "b", "a"])
    assert len(found) == 3
    assert found.n_duplicates == 1
    assert from_values([("a", "x"), ("a", "y")]).n_duplicates == 0


def test_text_file_is_a_prompt_a_line(tmp_path):
    spec = write(tmp_path / "p.txt", "\ufeffone\r\n\r\n  two \nthree")
    assert load_prompts(spec).prompts == ("one", "two", "three")
    with pytest.raises(InputError, match="response"):
        load_prompts(spec, need_response=True)


def test_column_is_picked_and_known_ones_are_preferred_in_order(tmp_path):
    spec = write(tmp_path / "jbb.csv", "Goal,Behavior,Extra\nWrite it,Short,x\n")
    assert load_prompts(spec).prompts == ("Write it",)
    assert load_prompts(f"{spec}:Extra").prompts == ("x",)
    assert load_prompts(f"{spec}:behavior").prompts == ("Short",)
    with pytest.raises(InputError, match="Goal, Behavior, Extra"):
        load_prompts(f"{spec}:nothing")


def test_a_path_that_holds_a_colon_is_that_file(tmp_path):
    spec = write(tmp_path / "odd:prompt.txt", "hello")
    assert load_prompts(spec).prompts == ("hello",)
    assert load_prompts(tmp_path / "odd:prompt.txt").prompts == ("hello",)


def test_responses_are_left_out_where_any_is_missing_and_none_is_needed(tmp_path):
    spec = write(
        tmp_path / "a.json", '[{"prompt": "p", "answer": "r"}, {"prompt": "q", "answer": 3}]'
    )
    assert load_prompts(spec).responses is None
    with pytest.raises(InputError, match="item 2: response is 3"):
        load_prompts(spec, need_response=True)


def test_named_sets_lead_to_package_files(tmp_path, monkeypatch):
    spec = write(tmp_path / "x.jsonl", '{"prompt": "p", "other": "o"}')
    organism = types.ModuleType("nest.organism")
    organism.prompt_file = lambda name: {"harmful": spec}[name]
    monkeypatch.setitem(sys.modules, "nest.organism", organism)
    assert load_prompts("organism:harmful").prompts == ("p",)
    assert load_prompts("organism:harmful:other").prompts == ("o",)


def test_pairs(tmp_path):
    spec = write(tmp_path / "pairs.csv", "unsafe,safe\nbad,good\nworse,better\n")
    unsafe, safe = load_pairs(spec)
    assert (unsafe.prompts, safe.prompts) == (("bad", "worse"), ("good", "better"))
    with pytest.raises(InputError, match="no column 'safe'"):
        load_pairs(write(tmp_path / "half.csv", "unsafe,other\na,b\n"))


BAD = {
    "empty.csv": ("", "is empty"),
    "blank.jsonl": (" \n ", "is empty"),
    "headonly.csv": ("prompt\n", "no rows"),
    "list.json": ('{"prompt": "x"}', "JSON dict"),
    "broken.json": ("[1, ", "not valid JSON"),
    "broken.jsonl": ('{"prompt": "a"}\n{"prompt": ', "line 2 is not valid JSON"),
    "number.jsonl": ("3", "expected an object or a string"),
    "wide.csv": ("prompt\na,b\n", "more fields"),
    "quote.csv": ('prompt\n"never closed\n', "not valid CSV"),
    "short.csv": ("x,prompt\na\n", "prompt is None"),
    "other.csv": ("a,b\n1,2\n", "its columns are a, b"),
    "hole.jsonl": ('{"prompt": "a"}\n{"prompt": "  "}', "line 2: prompt is empty"),
    "digits.jsonl": ('{"prompt": 5}', "prompt is 5; expected a string"),
    "bytes.txt": (b"fine\n\xff\xfe", "line 2: byte 0xff is not UTF-8"),
    "table.parquet": (b"PAR1 not really", "not a valid parquet"),
    "what.docx": ("x", "ending '.docx'"),
    "system.jsonl": (
        '{"messages": [{"role": "system", "content": "s"}]}',
        "has no turn of a user",
    ),
    "turns.jsonl": ('{"messages": "hello"}', "expected a list of turns"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_have_their_sentence(tmp_path, name):
    text, sentence = BAD[name]
    with pytest.raises(InputError, match=sentence) as caught:
        load_prompts(write(tmp_path / name, text))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(MissingInputError, match="no file"):
        load_prompts(str(tmp_path / "gone.csv"))
    with pytest.raises(MissingInputError, match=r"gone\.csv'"):
        load_prompts(str(tmp_path / "gone.csv") + ":goal")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        load_prompts(str(tmp_path / "folder.json"))


@pytest.mark.parametrize(
    "values", [[], "text", [""], ["a", ("b", "c")], [("a", "")], [3], [("a",)]]
)
def test_bad_values(values):
    with pytest.raises(InputError):
        from_values(values)
