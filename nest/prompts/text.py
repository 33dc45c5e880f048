"""Text files as other programs write them: UTF-8 with or without a byte order mark, any line ends."""

from __future__ import annotations

from pathlib import Path

from nest.errors import InputError

BOM = "\ufeff"


def read_text(path: Path) -> str:
    """A file's text, without a byte order mark.

    Raises:
        InputError: it cannot be read, or is not UTF-8; names the line.
    """
    try:
        return decoded(path, path.read_bytes())
    except OSError as fault:
        raise InputError(
            f"{path} cannot be read: {fault.strerror}; expected a readable file"
        ) from None


def decoded(path: Path, raw: bytes) -> str:
    """A file's bytes as text, without a byte order mark.

    Raises:
        InputError: they are not UTF-8; names the line.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = raw.count(b"\n", 0, fault.start) + 1
        raise InputError(
            f"{path}, line {line}: byte 0x{raw[fault.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def lines_of(text: str) -> list[str]:
    """Lines whatever ends them: line feed, carriage return or both.

    Not `splitlines`, which also splits at U+2028 and its like. Files that were put one behind the other
    have a byte order mark before a line in the middle: it goes, too.
    """
    unified = text.replace("\r\n", "\n").replace("\r", "\n")
    return [line.removeprefix(BOM) for line in unified.split("\n")]


def check_unicode(text: str, what: str, where: str) -> None:
    """Refuse text that no file and no tokenizer can hold.

    Raises:
        InputError: half of a character that UTF-16 writes in two (a lone surrogate).
    """
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        half = f"\\u{ord(text[fault.start]):04x}"
        raise InputError(
            f"{where}: {what} holds half a character ({half} at {fault.start}, a lone surrogate); it was "
            "cut in two somewhere: repair the text, or take the row out"
        ) from None
