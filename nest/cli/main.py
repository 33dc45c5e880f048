"""The command line: one file per subcommand, each a thin call of the public API."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from nest.cli import (
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
from nest.cli.common import reporting_errors, say_stopped
from nest.cli.signals import exit_code, received, stopping_on_signals
from nest.cli.streams import make_usable

app = typer.Typer(
    name="nest",
    help="Neuron-selective safety tuning: find the few neurons that carry refusal, train one small "
    "shared update per cluster, ship it as an exact patch.",
    epilog="Example: nest demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        from nest.version import __version__

        typer.echo(f"nest {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version)
    ] = False,
) -> None:
    pass


for _name, _module in (
    ("demo", demo),
    ("select", select),
    ("inspect", inspect),
    ("tune", tune),
    ("eval", evaluate),
    ("fold", fold),
    ("revert", revert),
    ("verify", verify),
):
    app.command(_name, help=_module.HELP, epilog=_module.EXAMPLE)(reporting_errors(_module.command))
app.add_typer(organism.app, name="organism", help=organism.HELP)


def run() -> None:
    """Entry point of the console script."""
    # Progress is ours to show; the libraries' own bars would mix with results and warnings.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    make_usable()
    with stopping_on_signals():
        try:
            app()
        except KeyboardInterrupt as stop:  # before a subcommand was there to tell of it
            say_stopped(stop)
            raise SystemExit(exit_code()) from None
        except SystemExit:
            if received() is None:
                raise
            # also where click or an import made something else of it
            raise SystemExit(exit_code()) from None
