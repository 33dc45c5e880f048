"""Judgements kept on disk, so that no model is asked twice for the same."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nest.artifacts.storage import in_turn
from nest.judging.judge import Exchange, Judge, Judgement, Verdict


def default_folder() -> Path:
    """`nest/judgements` in the user's cache: XDG_CACHE_HOME, or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    base = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    return base / "nest" / "judgements"


class Cached:
    """A judge whose judgements are kept in a folder, a file for each judge's hash.

    The file is JSON lines, read and added to in turn, so that several processes can share it; lines
    that cannot be read (cut off by a kill, or damaged) are left out with a warning, and judged anew. A
    folder that cannot be written is warned of, and nothing is kept. Unparsed judgements are not kept: they
    may be a server's mood.

    Args:
        judge: The judge; worth it for those that ask a model.
        folder: Where the files are; made when the first judgement is kept.
    """

    def __init__(self, judge: Judge, folder: str | Path) -> None:
        self._judge = judge
        self.name = judge.name
        self._file = Path(folder).expanduser() / f"{judge.sha256}.jsonl"
        self._known: dict[str, Judgement] | None = None

    @property
    def sha256(self) -> str:
        """The judge's own: what is kept is what it would say."""
        return self._judge.sha256

    def judge(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        """Judgements, one an exchange; the judge is asked for those that are not known, once each.

        Raises:
            InputError, EngineError: as the judge.
        """
        if self._known is None:
            self._known = self._read()
        known = self._known
        keys = [key_of(exchange) for exchange in exchanges]
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        new = [row for row, key in enumerate(keys) if key not in known and first[key] == row]
        found = dict(known)
        if new:
            judgements = self._judge.judge([exchanges[row] for row in new])
            fresh = {keys[row]: said for row, said in zip(new, judgements, strict=True)}
            found |= fresh
            kept = {k: said for k, said in fresh.items() if said.verdict is not Verdict.UNPARSED}
            known |= kept
            self._add(kept)
        return [found[key] for key in keys]

    def _read(self) -> dict[str, Judgement]:
        known: dict[str, Judgement] = {}
        try:
            with self._file.open("rb") as file, in_turn(file.fileno(), alone=False):
                content = file.read()
        except FileNotFoundError:
            return known
        except OSError as fault:
            _warn(f"{self._file} cannot be read ({fault.strerror}); all is judged anew")
            return known
        n_damaged = 0
        for line in filter(None, content.split(b"\n")):
            try:
                entry = json.loads(line)
                known[_text(entry["key"])] = _judgement(entry["judgement"])
            except (ValueError, TypeError, KeyError, RecursionError):
                n_damaged += 1
        if n_damaged:
            _warn(
                f"{n_damaged} lines of {self._file} are damaged and left out; what they held is judged anew"
            )
        return known

    def _add(self, judgements: Mapping[str, Judgement]) -> None:
        lines = [
            json.dumps({"key": key, "judgement": asdict(said)}) for key, said in judgements.items()
        ]
        if not lines:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab") as file, in_turn(file.fileno(), alone=True):
                # begins a line of its own whatever another process has left unfinished
                file.write(("\n" + "\n".join(lines) + "\n").encode())
                file.flush()
        except OSError as fault:
            _warn(f"judgements cannot be kept in {self._file} ({fault.strerror}); they are used")


def key_of(exchange: Exchange) -> str:
    """Hash of all that a judge is given."""
    content = [
        exchange.conversation.messages(),
        exchange.conversation.prefill,
        exchange.response,
        exchange.reference,
        exchange.harmless,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _judgement(values: Any) -> Judgement:
    """What `asdict` gave.

    Raises:
        ValueError, TypeError, KeyError: it is something else.
    """
    score, category = values["score"], values["category"]
    if score is not None and (isinstance(score, bool) or not math.isfinite(score)):
        raise ValueError("score")
    return Judgement(
        Verdict(values["verdict"]),
        None if score is None else float(score),
        None if category is None else _text(category),
        _text(values["said"]),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("text")
    return value


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
