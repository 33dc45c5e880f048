"""What all subcommands share: options, progress on stderr, results on stdout, errors in one line."""

from __future__ import annotations

import functools
import json
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar

import typer

from nest.cli import signals
from nest.cli.progress import ProgressLines, progress_bars
from nest.cli.streams import is_terminal, keep_result, say, silence_stdout
from nest.errors import InputError, MissingInputError, NestError
from nest.progress import ProgressCallback
from nest.prompts.text import read_text

if TYPE_CHECKING:
    from torch import nn

EXIT_GATE_FAILED = 3

P = ParamSpec("P")
R = TypeVar("R")


def load_config(ctx: typer.Context, value: Path | None) -> Path | None:
    """Take defaults from a TOML file: top-level keys, or a table named after the subcommand.

    Raises:
        InputError: not readable as TOML, or a key that is no option of the subcommand.
    """
    if value is None:
        return None
    if not value.exists():
        raise MissingInputError(f"there is no file {str(value)!r}; name a TOML file")
    try:
        content = tomllib.loads(read_text(value))
    except tomllib.TOMLDecodeError as fault:
        raise InputError(f"{value} cannot be read as TOML: {fault}") from None
    command = ctx.info_name or ""
    # One file may serve several subcommands: tables are theirs, plain keys are for all of them.
    plain = {key: entry for key, entry in content.items() if not isinstance(entry, dict)}
    own = content.get(command, {})
    if not isinstance(own, dict):
        raise InputError(f"{value} sets {command} to {own!r}; it must be a table, [{command}]")
    tables = _command_names(ctx.find_root().command)
    strange = sorted(set(content) - set(plain) - tables)
    if strange:
        raise InputError(
            f"{value} has the table {', '.join(strange)}, which is no subcommand; there are "
            f"{', '.join(sorted(tables))}"
        )
    settings = {key.replace("-", "_"): entry for key, entry in {**plain, **own}.items()}
    known = {parameter.name for parameter in ctx.command.params} - {"config", "help"}
    aliases = {name.rstrip("_"): name for name in known if name}
    unknown = sorted(set(settings) - set(aliases))
    if unknown:
        raise InputError(
            f"{value} sets {', '.join(unknown)}, which nest {command} does not know; its options are "
            f"{', '.join(sorted(aliases))}"
        )
    ctx.default_map = {aliases[key]: entry for key, entry in settings.items()}
    return value


def _command_names(command: Any) -> set[str]:
    """Names of all subcommands, those of groups included."""
    names: set[str] = set()
    for name, child in getattr(command, "commands", {}).items():
        names |= {name} | _command_names(child)
    return names


def _config_option(ctx: typer.Context, value: Path | None) -> Path | None:
    return reporting_errors(load_config)(ctx, value)


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


def parse_layers(value: str | None) -> tuple[int, int | None] | None:
    """`A:B` as the first layer and the one after the last; either may be left out.

    Raises:
        InputError: something else.
    """
    if value is None:
        return None
    first, colon, end = value.partition(":")
    if colon and all(part == "" or part.isdecimal() for part in (first, end)):
        return int(first or 0), int(end) if end else None
    raise InputError(
        f"--layers is {value!r}; it must be A:B, the first layer and the one after the last, such "
        "as 8:24 or 8:"
    )


def parse_template_kwargs(values: Sequence[str] | None) -> dict[str, Any]:
    """`NAME=VALUE` each; a value that is JSON (true, 3, "x") is read as such, others are texts.

    Raises:
        InputError: no name, no `=`, or one name twice.
    """
    found: dict[str, Any] = {}
    for text in values or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise InputError(
                f"--template-kwargs is {text!r}; it must be NAME=VALUE, such as enable_thinking=false"
            )
        if name.strip() in found:
            raise InputError(f"--template-kwargs sets {name.strip()} twice; set it once")
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = value
    return found


ModelOption = Annotated[
    str, typer.Option("--model", help="A local folder, a name on the Hub, or `organism`.")
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist yet.")]
PatchOption = Annotated[Path, typer.Option("--patch", help="Folder that `nest tune` wrote.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace --out once the new one is complete.")
]
RestartOption = Annotated[
    bool,
    typer.Option(
        "--restart", help="Begin anew where an interrupted run left unfinished work beside --out."
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file with defaults for these options; flags win.",
        is_eager=True,
        callback=_config_option,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Decides everything random.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="auto keeps the checkpoint's; float32, bfloat16, float16.")
]
BatchSizeOption = Annotated[
    str,
    typer.Option("--batch-size", help="auto, or prompts a forward pass (tune: dialogues a step)."),
]
SystemOption = Annotated[
    str | None, typer.Option("--system", help="System prompt put before every prompt.")
]
TemplateOption = Annotated[
    list[str] | None,
    typer.Option(
        "--template-kwargs",
        help="Switch of the chat template, NAME=VALUE, such as enable_thinking=false; repeatable.",
    ),
]
LayersOption = Annotated[
    str | None,
    typer.Option("--layers", help="A:B restricts to layers A to B - 1; all of them if unset."),
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Of a model on the Hub: branch, tag or commit.")
]
DeviceMapOption = Annotated[
    str | None, typer.Option("--device-map", help="Spread over devices: auto, balanced, ...")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]


@dataclass
class Session:
    """One run of a subcommand.

    Attributes:
        as_json: Results are one JSON object.
        progress: For the stages' `progress=`.
        quiet: No progress and no notes.
    """

    as_json: bool
    progress: ProgressCallback
    quiet: bool = False

    def result(self, values: Mapping[str, Any], *renderables: Any) -> None:
        """Print the result: JSON if asked for, else tables; what users named is printed as it is.

        Raises:
            NestError: stdout does not take it; it is then in a file.
        """
        try:
            self._print(values, renderables)
            sys.stdout.flush()
        except BrokenPipeError:
            raise  # `| head` has seen enough
        except OSError as fault:
            silence_stdout()
            kept = keep_result(values)
            where = "and no file could be written either" if kept is None else f"it is in {kept}"
            raise NestError(
                f"the result could not be printed ({fault.strerror or fault}); {where}"
            ) from fault

    def _print(self, values: Mapping[str, Any], renderables: Sequence[Any]) -> None:
        if self.as_json:
            typer.echo(json.dumps(values, allow_nan=False, default=str))
            return
        from rich.console import Console

        console = Console(markup=False, emoji=False, highlight=False)
        for renderable in renderables:
            # A path is not broken into lines where there is no terminal, and never where it is one.
            console.print(renderable, soft_wrap=isinstance(renderable, str))

    def note(self, text: str) -> None:
        """One line on stderr, unless --quiet."""
        if not self.quiet:
            say(text)

    def warn(self, text: str) -> None:
        """One line on stderr."""
        say(f"warning: {text}")


@contextmanager
def session(as_json: bool, quiet: bool) -> Iterator[Session]:
    """A run's session: bars on stderr where it is a terminal, else a line now and then.

    With every step of progress a stop that got lost is raised again.
    """
    import warnings

    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.showwarning = _show_warning
        show: ProgressCallback | None = None
        if not quiet:
            terminal = is_terminal(sys.stderr)
            show = stack.enter_context(progress_bars()) if terminal else ProgressLines()

        def progress(stage: str, done: int, total: int) -> None:
            signals.check()
            if show is not None:
                show(stage, done, total)

        yield Session(as_json, progress, quiet)
        signals.check()


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {message}")


def warn_if_not_foldable(
    run: Session, model: str, network: nn.Module, dtype: str, revision: str | None
) -> None:
    """Say before the work that a patch made in this dtype does not fit the checkpoint's own."""
    from nest import api

    if dtype == "auto":
        return
    stored, loaded = api.stored_dtype(model, revision=revision), next(network.parameters()).dtype
    if stored not in (None, loaded):
        run.warn(
            f"the checkpoint's weights are {str(stored).removeprefix('torch.')}, and --dtype asks for "
            f"{dtype}: a patch is exact in one dtype only, and this one will not fold into the checkpoint. "
            "Leave out --dtype for one that does"
        )


def reporting_errors(function: Callable[P, R]) -> Callable[P, R]:
    """A known error becomes one line on stderr and exit code 1; a signal one of its own."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt as stop:
            say_stopped(stop)
            raise typer.Exit(signals.exit_code()) from None
        except Exception as fault:
            if signals.received() is not None:  # an import that was hit by it says something else
                say_stopped(fault)
                raise typer.Exit(signals.exit_code()) from None
            if not isinstance(fault, NestError):
                raise
            say(f"error: {' '.join(str(fault).split())}")
            raise typer.Exit(1) from None

    return wrapped


def say_stopped(stop: BaseException) -> None:
    notes = getattr(stop, "__notes__", ())
    say("; ".join(("interrupted", *(notes or ("nothing half-written was left",)))))
