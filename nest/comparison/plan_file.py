"""A comparison's plan as a TOML file: where its files lie, and what its worlds have in common."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from nest.comparison.plan import Anytime, Front, HeldOut, OwnWorld, Plan, Robustness, Sweep
from nest.errors import InputError, MissingInputError
from nest.prompts.text import read_text

PATHS = (
    *("model", "unsafe", "safe", "harmful", "benign", "complying"),
    *("borderline", "attacks"),
)
SPLITS = ("development", "test")
STAGES: Mapping[str, type[Any]] = {
    "sweep": Sweep,
    "front": Front,
    "anytime": Anytime,
    "robustness": Robustness,
}


def read_plan(path: str | Path) -> Plan:
    """A plan from a TOML file; paths in it are meant from the file's own folder.

    What `[every_world]` says holds for each `[world.NAME]` that does not say it itself.

    Raises:
        InputError: no such file, not TOML, or entries that cannot be; all of them are named.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(
            f"there is no file {str(path)!r}; name the TOML file of a comparison"
        )
    try:
        content = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as fault:
        raise InputError(f"{path} cannot be read as TOML: {fault}") from None
    try:
        _check_order(content)
        return Plan(**_with_paths(_with_every_world(content), path.parent))
    except InputError as fault:
        raise InputError(f"{path}: {fault}") from None
    except TypeError as fault:
        raise InputError(f"{path}: {fault}") from None


def _check_order(content: Mapping[str, Any]) -> None:
    """Refuse plain keys of the plan below the head of a table, which in TOML makes them the table's.

    Raises:
        InputError: says which, and of which table.
    """
    plain = [one.name for one in fields(Plan)]
    for what, table, kind in _tables(content):
        if not isinstance(table, Mapping):
            continue
        own = [one.name for one in fields(kind)]
        swallowed = [key for key in table if key in plain and key not in own]
        if swallowed:
            raise InputError(
                f"[{what}] holds {', '.join(swallowed)}, since in TOML a table takes all plain keys that "
                f"follow its head; move [{what}] below them"
            )


def _tables(content: Mapping[str, Any]) -> Iterator[tuple[str, Any, type[Any]]]:
    """What each table's head says, what stands in its place, and what it is to be."""
    for stage, kind in STAGES.items():
        yield stage, content.get(stage), kind
    worlds = content.get("world")
    own = worlds if isinstance(worlds, Mapping) else {}
    for what, table in (
        ("every_world", content.get("every_world")),
        *((f"world.{name}", one) for name, one in own.items()),
    ):
        yield what, table, OwnWorld
        for split in SPLITS if isinstance(table, Mapping) else ():
            yield f"{what}.{split}", table.get(split), HeldOut


def _with_every_world(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the entries of `[every_world]` in each world that does not have its own.

    Raises:
        InputError: it is no table.
    """
    values = dict(content)
    common, worlds = values.pop("every_world", {}), values.get("world", {})
    if not isinstance(common, Mapping):
        raise InputError(f"every_world is {common!r}; it must be a table, [every_world]")
    if isinstance(worlds, Mapping) and all(isinstance(one, Mapping) for one in worlds.values()):
        values["world"] = {name: {**common, **own} for name, own in worlds.items()}
    return values


def _with_paths(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The same with files of worlds found from the plan's own folder, where they are there."""

    def found(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        name, colon, column = value.partition(":")
        beside = folder / name
        try:
            there = bool(name) and beside.exists()
        except OSError:  # too long for a file's name
            there = False
        return f"{beside}{colon}{column}" if there else value

    def with_paths(table: Any) -> Any:
        if not isinstance(table, Mapping):
            return table
        return {
            key: found(value) if key in PATHS else with_paths(value) if key in SPLITS else value
            for key, value in table.items()
        }

    worlds = content.get("world", {})
    if not isinstance(worlds, Mapping):
        return dict(content)
    return {**content, "world": {name: with_paths(table) for name, table in worlds.items()}}
