"""Rows of a prompt file in any of the formats we read, each with the place a message names."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nest.errors import InputError
from nest.prompts.text import decoded, lines_of

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")

Row = tuple[str, Mapping[str, Any]]
"""(place for messages such as `goals.csv, row 3`, values by column)"""


@dataclass(frozen=True)
class Table:
    """Rows of a file and every column that any of them has, in order of appearance."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def read_table(path: Path) -> Table:
    """Read a file by its ending. Text files are UTF-8; a `.txt` line is a row with the column
    `prompt`.

    Raises:
        InputError: an unknown ending, an empty or unreadable file, bytes that are not UTF-8, or a
            file that is not of the format its ending says.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the file in it that holds the prompts")
    if suffix not in SUFFIXES:
        raise InputError(
            f"{path} has the ending {suffix or 'none'!r}; expected one of {', '.join(SUFFIXES)}"
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}; expected a readable file"
        ) from None
    if not raw.strip():
        raise InputError(f"{path} is empty; expected at least one prompt")
    if suffix == ".parquet":
        rows = _parquet_rows(path, raw)
    else:
        rows = _TEXT_READERS[suffix](path, decoded(path, raw))
    if not rows:
        raise InputError(f"{path} has no rows; expected at least one prompt")
    columns = dict.fromkeys(column for _, row in rows for column in row)
    return Table(tuple(columns), tuple(rows))


def _txt_rows(path: Path, text: str) -> list[Row]:
    return [
        (f"{path}, line {number}", {"prompt": line.strip()})
        for number, line in enumerate(lines_of(text), start=1)
        if line.strip()
    ]


def _jsonl_rows(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(lines_of(text), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            rows.append((where, _as_row(_parsed(line, where), where)))
    return rows


def _json_rows(path: Path, text: str) -> list[Row]:
    value = _parsed(text, str(path))
    if not isinstance(value, list):
        raise InputError(
            f"{path} holds a JSON {type(value).__name__}; expected a list of objects or strings"
        )
    places = [f"{path}, item {number}" for number in range(1, len(value) + 1)]
    return [(where, _as_row(item, where)) for where, item in zip(places, value, strict=True)]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        raise InputError(
            f"{where} is not valid JSON ({error.msg}, {place}); mend or delete it"
        ) from None
    except RecursionError:
        raise InputError(f"{where} is not valid JSON: it is nested too deep") from None


def _as_row(item: Any, where: str) -> Mapping[str, Any]:
    if isinstance(item, str):
        return {"prompt": item}
    if isinstance(item, dict):
        return item
    raise InputError(f"{where} is {shortened(item)}; expected an object or a string")


def _csv_rows(path: Path, text: str) -> list[Row]:
    # Answers may be long: csv's own bound is 128 KiB a field, kept for all of the process.
    bound = csv.field_size_limit(len(text) + 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = reader.fieldnames or ()
        if len(header) == 1 and any(separator in header[0] for separator in _SEPARATORS):
            raise InputError(
                f"{path} is written with {_separator_of(header)} between its fields; save it with commas"
            )
        for number, row in enumerate(reader, start=1):
            if None in row:
                raise InputError(_too_many_fields(path, number, reader.fieldnames or ()))
            rows.append((f"{path}, row {number}", row))
    except csv.Error as error:
        raise InputError(f"{path} is not valid CSV near line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(bound)
    return rows


def _too_many_fields(path: Path, number: int, header: Sequence[str]) -> str:
    said = f"{path}, row {number} has more fields than the {len(header)} columns of the header"
    return f"{said}; put fields that hold commas in double quotes"


_SEPARATORS = {";": "semicolons", "\t": "tabs"}


def _separator_of(header: Sequence[str]) -> str:
    return next(name for separator, name in _SEPARATORS.items() if separator in header[0])


def _parquet_rows(path: Path, raw: bytes) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{path} needs pyarrow to be read; install it with `pip install pyarrow`"
        ) from None
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(raw))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a valid parquet file: {error}") from None
    return [(f"{path}, row {number}", row) for number, row in enumerate(table.to_pylist(), start=1)]


_TEXT_READERS = {".txt": _txt_rows, ".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}


def shortened(value: Any) -> str:
    """A value's repr, cut to 60 characters for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
