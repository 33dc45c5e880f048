"""Prompts and dialogues from files, named sets and plain values, checked row by row."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nest.errors import InputError, MissingInputError
from nest.prompts.table import SUFFIXES, Table, read_table, shortened
from nest.prompts.text import check_unicode

PROMPT_COLUMNS = ("prompt", "goal", "instruction", "question", "behavior")
"""Column names read as prompts, whatever their case; the first of them that a file has is taken."""
RESPONSE_COLUMNS = ("response", "output", "completion", "answer")
"""Column names read as responses, whatever their case, in order of preference."""
PROMPT_PARTS = {"instruction": ("input", "context"), "question": ("context",)}
"""Columns whose text stands under that of a prompt column: Alpaca's, Dolly's, SQuAD's."""
CONTEXT_COLUMNS = ("contextstring", "context_string")
"""The same, but standing before it: HarmBench's."""
BELONGING_COLUMNS = (
    *("input", "context", *CONTEXT_COLUMNS, "system", "system_prompt", "history"),
    *("choices", "options", "image", "images"),
)
"""Columns that may belong to a prompt: one that is not read but has something in it is warned of."""
NAMED_SET_PREFIX = "organism:"


@dataclass(frozen=True)
class PromptSet:
    """Prompts in file order, with their responses where there are any.

    Duplicates are kept, since a set's weights are its author's choice, and counted by
    `n_duplicates`.

    Attributes:
        name: Where the prompts came from, for messages and manifests.
        prompts: What the user says, unchanged.
        responses: What is answered, one for each prompt, or None for a set of prompts only.
        sha256: Hash of the content alone: the same rows give the same hash in every file format.
    """

    name: str
    prompts: tuple[str, ...]
    responses: tuple[str, ...] | None
    sha256: str

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def n_duplicates(self) -> int:
        """How many rows repeat an earlier row."""
        return len(self.prompts) - len(set(self._rows()))

    def dialogues(self) -> tuple[tuple[str, str], ...]:
        """(prompt, response) pairs.

        Raises:
            InputError: the set holds prompts only.
        """
        if self.responses is None:
            raise InputError(
                f"{self.name} holds prompts without responses; expected a column named "
                f"{_listed(RESPONSE_COLUMNS)}, or `messages`"
            )
        return tuple(zip(self.prompts, self.responses, strict=True))

    def to_manifest(self) -> dict[str, Any]:
        """Name, counts and hash, as manifests and reports record them."""
        return {
            "name": self.name,
            "n": len(self),
            "n_duplicates": self.n_duplicates,
            "sha256": self.sha256,
        }

    def _rows(self) -> list[tuple[str, ...]]:
        if self.responses is None:
            return [(prompt,) for prompt in self.prompts]
        return list(zip(self.prompts, self.responses, strict=True))


def load_prompts(spec: str | Path, need_response: bool = False) -> PromptSet:
    """Read a set of prompts, or of dialogues.

        load_prompts("goals.csv")                # its column prompt, goal, instruction, ...
        load_prompts("goals.csv:Behavior")       # this column
        load_prompts("pairs.json:prompt:refusal")  # and responses from this one; ::refusal picks it alone
        load_prompts("organism:harmful_train")   # a set of the embedded model

    A `.txt` file has one prompt a line, blank lines left out. A `.json` file is a list of objects
    or of strings. A column `messages` holds chats of one user turn and the assistant's answer to
    it. What Alpaca's `input`, Dolly's `context` and HarmBench's `ContextString` hold is put to the
    prompt; a warning names other columns with something in them that may belong to it.

    Args:
        spec: Path, `path:column`, `path:column:response column`, or `organism:NAME` in place of the
            path. A spec that exists as a file is that file, colons and all.
        need_response: Refuse a set without a response in every row. Where it is false, responses
            are taken if every row has one and left out otherwise.

    Raises:
        MissingInputError: no such file.
        InputError: an unknown format, an empty file, bytes that are not UTF-8, a file that cannot
            be parsed, no such column, or a row whose prompt or response is empty or no string.
    """
    path, column, response, name = _resolve(spec)
    return _from_rows(read_table(path), name, column, response, need_response)


def text_columns(spec: str | Path) -> dict[str, list[str]]:
    """Every column of a file that holds a text in each row: what else its responses could be."""
    path, _, _, _ = _resolve(spec)
    table = read_table(path)
    found: dict[str, list[Any]] = {
        column: [row.get(column) for _, row in table.rows] for column in table.columns
    }
    return {
        column: texts
        for column, texts in found.items()
        if all(isinstance(text, str) and text.strip() for text in texts)
    }


def load_pairs(path: str | Path) -> tuple[PromptSet, PromptSet]:
    """Matched prompts: row i of both sets says the same but for its harm.

    Args:
        path: File with the columns `unsafe` and `safe`, in any format but `.txt`.

    Returns:
        The unsafe and the safe prompts, of equal length.

    Raises:
        InputError: as `load_prompts`.
    """
    resolved, column, response, name = _resolve(path)
    if column is not None or response is not None:
        raise InputError(f"{path} names a column; pairs are read from the columns unsafe and safe")
    rows = read_table(resolved)
    unsafe = _from_rows(rows, f"{name}:unsafe", "unsafe", None, False)
    safe = _from_rows(rows, f"{name}:safe", "safe", None, False)
    return (
        from_values(unsafe.prompts, unsafe.name),
        from_values(safe.prompts, safe.name),
    )


def from_values(values: Sequence[object], name: str = "given") -> PromptSet:
    """A set from Python values: prompts, or (prompt, response) pairs.

    Raises:
        InputError: nothing in it, a mixture of both, or an empty or non-string text.
    """
    if isinstance(values, str):
        raise InputError(f"{name}: one string was given; expected a list of prompts or of pairs")
    items: list[Any] = list(values)
    if not items:
        raise InputError(f"{name} is empty; expected at least one prompt")
    paired = not isinstance(items[0], str)
    prompts: list[str] = []
    responses: list[str] = []
    for number, item in enumerate(items, start=1):
        where = f"{name}, item {number}"
        pair = isinstance(item, tuple | list) and len(item) == 2
        if not (pair if paired else isinstance(item, str)):
            raise InputError(
                f"{where} is {shortened(item)}; expected strings only, or (prompt, response) "
                "pairs only"
            )
        prompts.append(_text(item[0] if paired else item, "prompt", where))
        if paired:
            responses.append(_text(item[1], "response", where))
    return _prompt_set(name, prompts, responses if paired else None)


def _prompt_set(name: str, prompts: Sequence[str], responses: Sequence[str] | None) -> PromptSet:
    kept = tuple(responses) if responses is not None else None
    digest = hashlib.sha256()
    for index, prompt in enumerate(prompts):
        row = [prompt] if kept is None else [prompt, kept[index]]
        digest.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
    return PromptSet(name, tuple(prompts), kept, digest.hexdigest())


# --- where a spec leads ---------------------------------------------------------------------------


def _resolve(spec: str | Path) -> tuple[Path, str | None, str | None, str]:
    """(file, prompt column, response column, name for messages) of a spec."""
    text = str(spec)
    if isinstance(spec, str) and text.startswith(NAMED_SET_PREFIX) and not Path(text).exists():
        from nest.organism import prompt_file

        named, *columns = text.removeprefix(NAMED_SET_PREFIX).split(":", 2)
        column, response = [*(name or None for name in columns), None, None][:2]
        return Path(prompt_file(named)), column, response, text
    path, chosen = Path(text), []
    fronts = [text.rsplit(":", n) for n in (1, 2) if text.count(":") >= n]
    if not path.exists():
        for front, *columns in fronts:
            if Path(front).exists() or Path(front).suffix.lower() in SUFFIXES:
                path, chosen = Path(front), columns
                break
    if chosen and chosen[-1] == "":
        raise InputError(
            f"{text} ends in a colon; expected FILE, FILE:COLUMN or FILE:COLUMN:RESPONSE"
        )
    if not path.exists():
        raise MissingInputError(
            f"there is no file {str(path)!r}; expected a {', '.join(SUFFIXES)} file, FILE:COLUMN "
            f"or a named set such as {NAMED_SET_PREFIX}NAME"
        )
    column, response = [*(name or None for name in chosen), None, None][:2]
    return path, column, response, text


# --- rows into prompts ----------------------------------------------------------------------------


def _from_rows(
    table: Table, name: str, column: str | None, response: str | None, need_response: bool
) -> PromptSet:
    if column is None and _find(table.columns, PROMPT_COLUMNS) is None:
        messages = _find(table.columns, ("messages",))
        if messages is not None:
            dialogues = [_single_turn(row.get(messages), where) for where, row in table.rows]
            return _of_dialogues(dialogues, name, need_response, table)
    wanted = PROMPT_COLUMNS if column is None else (column,)
    # a column named by hand is taken exactly as written before its case is forgiven
    prompt_column = column if column in table.columns else _find(table.columns, wanted)
    if prompt_column is None:
        expected = _listed((*PROMPT_COLUMNS, "messages")) if column is None else repr(column)
        raise InputError(
            f"{name} has no column {expected}; its columns are {_listed(table.columns)}: "
            "choose one with FILE:COLUMN"
        )
    others = tuple(known for known in table.columns if known != prompt_column)
    response_column = _find(others, RESPONSE_COLUMNS if response is None else (response,))
    if response_column is None and (need_response or response is not None):
        expected = _listed(RESPONSE_COLUMNS) if response is None else repr(response)
        raise InputError(
            f"{name} has no column {expected}; its columns are {_listed(table.columns)}: a response is "
            "needed in every row, choose its column with FILE:COLUMN:RESPONSE"
        )
    before, after = _parts_of(table, prompt_column) if column is None else ((), ())
    used = (prompt_column, response_column, *before, *after)
    _warn_of_left_out(table, name, tuple(c for c in table.columns if c not in used))
    dialogues = [
        (
            _joined(row, before, prompt_column, after, where),
            row.get(response_column) if response_column is not None else None,
        )
        for where, row in table.rows
    ]
    return _of_dialogues(dialogues, name, need_response or response is not None, table)


def _parts_of(table: Table, prompt_column: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns whose text stands before and after that of the prompt column."""
    known = prompt_column.strip().lower()
    context = _find(table.columns, CONTEXT_COLUMNS) if known == "behavior" else None
    own = _find(table.columns, PROMPT_PARTS.get(known, ()))
    return (() if context is None else (context,)), (() if own is None else (own,))


def _joined(
    row: Mapping[str, Any],
    before: Sequence[str],
    prompt_column: str,
    after: Sequence[str],
    where: str,
) -> str:
    prompt = _text(row.get(prompt_column), prompt_column, where)
    around = [
        [_text(row[c], c, where) for c in columns if not _is_blank(row.get(c))]
        for columns in (before, after)
    ]
    return "\n\n".join((*around[0], prompt, *around[1]))


def _warn_of_left_out(table: Table, name: str, others: Sequence[str]) -> None:
    for column in others:
        if column.strip().lower() not in BELONGING_COLUMNS:
            continue
        n = sum(not _is_blank(row.get(column)) for _, row in table.rows)
        if n:
            warnings.warn(
                f"{name}: the column {column} has something in {n} of {len(table.rows)} rows and is not "
                "part of the prompts; put it into the prompt's column if it belongs there",
                stacklevel=5,
            )


def _is_blank(value: Any) -> bool:
    """Nothing, white space, an empty list, or the NaN that pandas puts in place of nothing."""
    return (
        value is None
        or value != value
        or (hasattr(value, "__len__") and not str(value).strip(" []"))
    )


def _of_dialogues(
    dialogues: Sequence[tuple[str, Any]], name: str, need_response: bool, table: Table
) -> PromptSet:
    prompts = [prompt for prompt, _ in dialogues]
    answered = all(isinstance(answer, str) and answer.strip() for _, answer in dialogues)
    if not need_response and not answered:
        return _prompt_set(name, prompts, None)
    responses = [
        _text(answer, "response", where)
        for (_, answer), (where, _) in zip(dialogues, table.rows, strict=True)
    ]
    return _prompt_set(name, prompts, responses)


def _single_turn(messages: Any, where: str) -> tuple[str, str | None]:
    """(prompt, response) of a chat of one user turn and at most one answer."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise InputError(f"{where}: messages is {shortened(messages)}; expected a list of turns")
    roles = [turn.get("role") for turn in messages]
    if roles not in (["user"], ["user", "assistant"]):
        raise InputError(
            f"{where}: messages has the turns {roles}; expected one user turn and at most one "
            "assistant turn after it (a system prompt is an option of the command, not of a row)"
        )
    texts = [_text(turn.get("content"), f"{turn['role']} turn", where) for turn in messages]
    return texts[0], texts[1] if len(texts) > 1 else None


def _find(columns: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first column whose name is one of `wanted`, in the order of `wanted`, case forgiven."""
    lowered: dict[str, str] = {}
    for column in columns:
        lowered.setdefault(column.strip().lower(), column)
    return next((lowered[name.lower()] for name in wanted if name.lower() in lowered), None)


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {what} is {shortened(value)}; expected a string")
    if not value.strip():
        raise InputError(f"{where}: {what} is empty; fill it in or take the row out")
    check_unicode(value, what, where)
    return value


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"
