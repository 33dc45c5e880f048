"""Defaults from a TOML file: defaults < file < flag."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict

from nest.errors import InputError, MissingInputError
from nest.prompts.text import read_text


class FileDefaults:
    """The entries of a TOML file: plain keys are for all subcommands, a table is its subcommand's own.

    Args:
        path: The file.

    Raises:
        InputError: no such file, or not readable as TOML.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.exists():
            raise MissingInputError(f"there is no file {str(path)!r}; name a TOML file")
        try:
            self._content = tomllib.loads(read_text(path))
        except tomllib.TOMLDecodeError as fault:
            raise InputError(f"{path} cannot be read as TOML: {fault}") from None

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Set what no flag has set; called by cyclopts for the subcommand that runs.

        Raises:
            InputError: a table that is no subcommand, a key that is no option of it, or one twice.
        """
        settings = self._settings_of(commands)
        known = {
            name.removeprefix("--").replace("-", "_")
            for argument in arguments
            for name in argument.names
            if name.startswith("--")
        } - {"config"}
        unknown = sorted(set(settings) - known)
        if unknown:
            options = sorted(name for name in known if not name.startswith("no_"))
            raise InputError(
                f"{self._path} sets {', '.join(unknown)}, which nest {' '.join(commands)} does not know; "
                f"its options are {', '.join(options)}"
            )
        flags = {name.replace("_", "-"): value for name, value in settings.items()}
        Dict(flags, use_commands_as_keys=False, source=str(self._path))(app, commands, arguments)

    def _settings_of(self, commands: Sequence[str]) -> dict[str, Any]:
        plain = {key: entry for key, entry in self._content.items() if not isinstance(entry, dict)}
        command = commands[-1] if commands else ""
        own = self._content.get(command, {})
        if not isinstance(own, Mapping):
            raise InputError(
                f"{self._path} sets {command} to {own!r}; it must be a table, [{command}]"
            )
        strange = sorted(set(self._content) - set(plain) - set(SUBCOMMANDS))
        if strange:
            raise InputError(
                f"{self._path} has the table {', '.join(strange)}, which is no subcommand; there are "
                f"{', '.join(sorted(SUBCOMMANDS))}"
            )
        settings: dict[str, Any] = {}
        for values in (plain, own):
            named = [key.replace("-", "_") for key in values]
            twice = sorted({name for name in named if named.count(name) > 1})
            if twice:
                raise InputError(f"{self._path} sets {', '.join(twice)} twice; set it once")
            settings |= dict(zip(named, values.values(), strict=True))
        return settings


SUBCOMMANDS = (
    *("demo", "select", "inspect", "tune", "eval", "fold", "revert", "verify"),
    *("organism", "export", "build"),
)
"""What a table can be named after."""


def file_in(tokens: Sequence[str]) -> Path | None:
    """The file that the command line names with --config; None where it names none."""
    for i, token in enumerate(tokens):
        if token == "--":
            return None
        if token.startswith("--config="):
            return Path(token.partition("=")[2])
        if token == "--config" and i + 1 < len(tokens):
            return Path(tokens[i + 1])
    return None
