"""Prompts and dialogues from files, named sets and plain values, checked row by row."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nest.conversations.conversation import Conversation
from nest.errors import InputError, MissingInputError
from nest.prompts.formats import CHAT_COLUMNS, answer, chat, is_chat
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
SYSTEM_COLUMNS = ("system", "system_prompt")
"""Columns whose text is the system turn of their row."""
BELONGING_COLUMNS = (
    *("input", "context", *CONTEXT_COLUMNS, *SYSTEM_COLUMNS, "history"),
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
        conversations: What was said up to the user's turn that is to be answered.
        responses: What is answered, one for each conversation, or None for a set of prompts only.
        sha256: Hash of the content alone: the same rows give the same hash in every file format.
    """

    name: str
    conversations: tuple[Conversation, ...]
    responses: tuple[str, ...] | None
    sha256: str

    def __len__(self) -> int:
        return len(self.conversations)

    @property
    def prompts(self) -> tuple[str, ...]:
        """What the user says last in each conversation."""
        return tuple(conversation.asked for conversation in self.conversations)

    @property
    def n_duplicates(self) -> int:
        """How many rows repeat an earlier row."""
        return len(self) - len(set(self._rows()))

    def chats(self) -> tuple[tuple[Conversation, str], ...]:
        """(conversation, response) pairs.

        Raises:
            InputError: the set holds prompts only.
        """
        self.dialogues()
        assert self.responses is not None
        return tuple(zip(self.conversations, self.responses, strict=True))

    def dialogues(self) -> tuple[tuple[str, str], ...]:
        """(prompt, response) pairs: what the user says last, and what is answered.

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

    def _rows(self) -> list[tuple[object, ...]]:
        if self.responses is None:
            return [(conversation,) for conversation in self.conversations]
        return list(zip(self.conversations, self.responses, strict=True))


def load_prompts(spec: str | Path, need_response: bool = False) -> PromptSet:
    """Read a set of prompts, or of dialogues.

        load_prompts("goals.csv")                # its column prompt, goal, instruction, ...
        load_prompts("goals.csv:Behavior")       # this column
        load_prompts("pairs.json:prompt:refusal")  # and responses from this one; ::refusal picks it alone
        load_prompts("organism:harmful")         # a set of the embedded model

    A `.txt` file has one prompt a line, blank lines left out. A `.json` file is a list of objects
    or of strings. A column `messages` or `conversations` holds whole chats, in OpenAI's form or
    ShareGPT's: a system turn or none, user and assistant, the assistant's last turn being the response. A
    prompt or response may be a list of turns as well (TRL's). Where a file has a prompt column and
    `messages` and no responses beside them, `messages` is read. What Alpaca's `input`, Dolly's `context`
    and HarmBench's `ContextString` hold is put to the prompt, a column `system` or `system_prompt` is the
    system turn; a warning names other columns with something in them that may belong to the prompt.

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
        from_values(unsafe.conversations, unsafe.name),
        from_values(safe.conversations, safe.name),
    )


def from_values(values: Sequence[object], name: str = "given") -> PromptSet:
    """A set from Python values: prompts, or (prompt, response) pairs; a prompt is a text or a conversation.

    Raises:
        InputError: nothing in it, a mixture of both, or an empty or non-string text.
    """
    if isinstance(values, str):
        raise InputError(f"{name}: one string was given; expected a list of prompts or of pairs")
    if not isinstance(values, Iterable):
        raise InputError(f"{name} is {shortened(values)}; expected a file, or a list of prompts")
    items: list[Any] = list(values)
    if not items:
        raise InputError(f"{name} is empty; expected at least one prompt")
    paired = not isinstance(items[0], (str, Conversation))
    prompts: list[Conversation] = []
    responses: list[str] = []
    for number, item in enumerate(items, start=1):
        where = f"{name}, item {number}"
        pair = isinstance(item, tuple | list) and len(item) == 2
        if not (pair if paired else isinstance(item, (str, Conversation))):
            raise InputError(
                f"{where} is {shortened(item)}; expected strings only, or (prompt, response) "
                "pairs only"
            )
        prompts.append(_asked(item[0] if paired else item, where))
        if paired:
            responses.append(_text(item[1], "response", where))
    return _prompt_set(name, prompts, responses if paired else None)


def _asked(value: Any, where: str) -> Conversation:
    if isinstance(value, Conversation):
        value.require_open()
        return value
    return Conversation.of(_text(value, "prompt", where))


def _prompt_set(
    name: str, conversations: Sequence[Conversation], responses: Sequence[str] | None
) -> PromptSet:
    kept = tuple(responses) if responses is not None else None
    digest = hashlib.sha256()
    for index, conversation in enumerate(conversations):
        said: list[Any] = [conversation.asked]
        if not conversation.is_plain:
            said = [conversation.messages(), conversation.prefill]
        row = said if kept is None else [*said, kept[index]]
        digest.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
    return PromptSet(name, tuple(conversations), kept, digest.hexdigest())


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
    whole = _chat_column(table, column, response)
    if whole is not None:
        chats = [
            _split(chat(row.get(whole), whole, where), whole, where) for where, row in table.rows
        ]
        return _of_dialogues(chats, name, need_response, table)
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
    system_column = _find(others, SYSTEM_COLUMNS)
    used = (prompt_column, response_column, system_column, *before, *after)
    _warn_of_left_out(table, name, tuple(c for c in table.columns if c not in used))
    dialogues = []
    for where, row in table.rows:
        conversation = _conversation(row, before, prompt_column, after, where)
        if system_column is not None and not _is_blank(row.get(system_column)):
            system = _text(row[system_column], system_column, where)
            conversation = conversation.with_system(system)
        said = None if response_column is None else row.get(response_column)
        if response_column is not None and is_chat(said):
            said = answer(said, conversation, response_column, where)
        dialogues.append((conversation, said))
    return _of_dialogues(dialogues, name, need_response or response is not None, table)


def _split(conversation: Conversation, column: str, where: str) -> tuple[Conversation, str | None]:
    """What is asked, and the answer.

    Raises:
        InputError: the turns before the answer do not end with a user's, or hold what is no text.
    """
    asked, said = conversation.split_answer()
    if not asked.awaits_answer:
        raise InputError(
            f"{where}: {column} has the turns {[turn.role for turn in conversation.turns]}; expected the "
            "assistant's answer to follow a user turn"
        )
    return asked, said


def _chat_column(table: Table, column: str | None, response: str | None) -> str | None:
    """The column of whole conversations that is to be read; None where prompts have their own."""
    if response is not None:
        return None
    if column is not None:
        found = column if column in table.columns else _find(table.columns, (column,))
        values = [] if found is None else [row.get(found) for _, row in table.rows]
        answered = any(
            is_chat(value) and value and _side(value[-1]) in ("assistant", "gpt")
            for value in values
        )
        return found if answered or column.strip().lower() in CHAT_COLUMNS else None
    found = _find(table.columns, CHAT_COLUMNS)
    has_prompts = _find(table.columns, PROMPT_COLUMNS) is not None
    has_responses = _find(table.columns, RESPONSE_COLUMNS) is not None
    return None if has_prompts and has_responses else found


def _side(turn: Any) -> Any:
    return turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None


def _conversation(
    row: Mapping[str, Any],
    before: Sequence[str],
    prompt_column: str,
    after: Sequence[str],
    where: str,
) -> Conversation:
    """What a row asks: the turns in its prompt column, or its text with those of other columns."""
    asked = row.get(prompt_column)
    if is_chat(asked) and asked:
        conversation = chat(asked, prompt_column, where)
        if not conversation.awaits_answer:
            raise InputError(
                f"{where}: {prompt_column} ends with the turn of the {conversation.turns[-1].role}; "
                "expected a user turn, which is what is answered"
            )
        return conversation
    return Conversation.of(_joined(row, before, prompt_column, after, where))


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
    dialogues: Sequence[tuple[Conversation, Any]], name: str, need_response: bool, table: Table
) -> PromptSet:
    conversations = [conversation for conversation, _ in dialogues]
    answered = all(isinstance(answer, str) and answer.strip() for _, answer in dialogues)
    if not need_response and not answered:
        return _prompt_set(name, conversations, None)
    responses = [
        _text(answer, "response", where)
        for (_, answer), (where, _) in zip(dialogues, table.rows, strict=True)
    ]
    return _prompt_set(name, conversations, responses)


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
