"""The command line: one file per subcommand, each a thin call of the public API."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter, ValidationError
from pydantic import ValidationError as SettingsError

from nest.cli import (
    compare,
    demo,
    evaluate,
    fold,
    inspect,
    organism,
    revert,
    select,
    tune,
    verify,
)
from nest.cli.defaults import FileDefaults, file_in
from nest.cli.signals import exit_code, received, stopping_on_signals
from nest.cli.streams import make_usable, say, silence_stdout
from nest.errors import NestError
from nest.settings import kind_of, sentence_of
from nest.version import __version__

EXIT_ERROR, EXIT_USAGE = 1, 2

app = App(
    name="nest",
    help="Neuron-selective safety tuning: find the few neurons that carry refusal, train one small "
    "shared update per cluster, ship it as an exact patch.",
    help_epilogue="Example: nest demo",
    help_format="markdown",
    version=f"nest {__version__}",
    default_parameter=Parameter(negative_iterable=(), negative_none=()),
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
)
for _name, _module in (
    ("demo", demo),
    ("select", select),
    ("inspect", inspect),
    ("tune", tune),
    ("eval", evaluate),
    ("fold", fold),
    ("revert", revert),
    ("verify", verify),
    ("compare", compare),
):
    app.command(_module.command, name=_name, help_epilogue=_module.EXAMPLE)
app.command(organism.app)


def run() -> None:
    """Entry point of the console script."""
    # Progress is ours to show; the libraries' own bars would mix with results and warnings.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    make_usable()
    with stopping_on_signals():
        raise SystemExit(_code_of(sys.argv[1:]))


def _code_of(tokens: Sequence[str]) -> int:
    """Run a command line; 0, or the exit code of what went wrong, which is told in one line."""
    try:
        # the file of a comparison says what is compared, and not what options are by default
        file = None if tokens[:1] == ["compare"] else file_in(tokens)
        app.config = () if file is None else (FileDefaults(file),)
        app(tokens)
    except KeyboardInterrupt as stop:
        return _stopped(stop)
    except BrokenPipeError:  # `| head` has seen enough
        silence_stdout()
        return 0
    except SystemExit as end:  # a gate that failed; or an import that was hit by a signal
        return end.code if received() is None and isinstance(end.code, int) else _stopped(end)
    except Exception as fault:
        if received() is not None:  # what a signal hit says something else
            return _stopped(fault)
        return _told(fault)
    return 0


def _told(fault: Exception) -> int:
    """Say what went wrong, and with which code to end.

    Raises:
        Exception: the fault, where it is none that we know.
    """
    cause, kind = fault, None
    if isinstance(fault, ValidationError) and isinstance(fault.__cause__, Exception):
        # what the check of a setting said, and not what cyclopts makes of it
        kind = None if fault.argument is None else kind_of(fault.argument.hint)
        cause = fault.__cause__
    if isinstance(cause, NestError):
        return _say_error(str(cause), EXIT_ERROR)
    if isinstance(cause, SettingsError):
        unreadable = any(
            entry["type"].endswith(("_parsing", "_type", "_from_float")) for entry in cause.errors()
        )
        return _say_error(sentence_of(cause, kind), EXIT_USAGE if unreadable else EXIT_ERROR)
    if isinstance(cause, CycloptsError):
        return _say_error(f"{cause} (nest COMMAND --help shows the options)", EXIT_USAGE)
    raise fault


def _say_error(text: str, code: int) -> int:
    say(f"error: {' '.join(text.split())}")
    return code


def _stopped(stop: BaseException) -> int:
    notes = getattr(stop, "__notes__", ())
    say("; ".join(("interrupted", *(notes or ("nothing half-written was left",)))))
    return exit_code()
