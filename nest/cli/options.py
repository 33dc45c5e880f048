"""Options that several subcommands share, as groups of fields, and values that are written in a word."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from nest.errors import InputError

Spread = Parameter(name="*")
"""On a group of options: its fields are flags of the subcommand's own."""

Switch = Annotated[bool, Parameter(negative=())]
"""A flag that is off unless it is given, without a --no- of its own."""


@dataclass(frozen=True)
class Talking:
    """How a run talks.

    Attributes:
        json: Print one JSON object on stdout.
        quiet: No progress on stderr.
    """

    json: Switch = False
    quiet: Switch = False


@dataclass(frozen=True)
class Running(Talking):
    """The same, and where its options come from.

    Attributes:
        json: Print one JSON object on stdout.
        quiet: No progress on stderr.
        config: TOML file with defaults for these options; flags win.
    """

    config: Path | None = None


@dataclass(frozen=True)
class Loading:
    """How a model is loaded.

    Attributes:
        device: auto, cpu, cuda, cuda:1, mps.
        device_map: Spread over devices: auto, balanced, ...
        dtype: auto keeps the checkpoint's; float32, bfloat16, float16.
        revision: Of a model on the Hub: branch, tag or commit.
        trust_remote_code: Run code that comes with the model.
    """

    device: str = "auto"
    device_map: str | None = None
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: Switch = False


@dataclass(frozen=True)
class Putting:
    """How prompts are put.

    Attributes:
        system: System prompt put before every prompt that has none of its own.
        template_kwargs: Switch of the chat template, NAME=VALUE, such as enable_thinking=false;
            repeatable.
    """

    system: str | None = None
    template_kwargs: Annotated[list[str] | None, Parameter(negative=(), metavar="NAME=VALUE")] = (
        None
    )

    def switches(self) -> dict[str, Any]:
        """The template's switches by name; a value that is JSON (true, 3, "x") is read as such.

        Raises:
            InputError: no name, no `=`, or one name twice.
        """
        found: dict[str, Any] = {}
        for text in self.template_kwargs or ():
            name, equals, value = text.partition("=")
            name = name.strip()
            if not equals or not name.isidentifier():
                raise InputError(
                    f"--template-kwargs is {text!r}; it must be NAME=VALUE, such as "
                    "enable_thinking=false"
                )
            if name in found:
                raise InputError(f"--template-kwargs sets {name} twice; set it once")
            try:
                found[name] = json.loads(value)
            except ValueError:
                found[name] = value
        return found


@dataclass(frozen=True)
class Writing:
    """What becomes of an older output.

    Attributes:
        overwrite: Replace --out once the new one is complete.
    """

    overwrite: Switch = False


@dataclass(frozen=True)
class LongWriting(Writing):
    """The same where work may have been interrupted.

    Attributes:
        overwrite: Replace --out once the new one is complete.
        restart: Begin anew where an interrupted run left unfinished work beside --out.
    """

    restart: Switch = False


TALKING, RUNNING = Talking(), Running()
LOADING, PUTTING = Loading(), Putting()
WRITING, LONG_WRITING = Writing(), LongWriting()


def parse_batch_size(value: str) -> int | Literal["auto"]:
    """`auto` or a number.

    Raises:
        InputError: neither.
    """
    if value == "auto":
        return "auto"
    if value.isdecimal() and int(value) > 0:
        return int(value)
    raise InputError(f"--batch-size is {value!r}; it must be auto or a number from 1")
