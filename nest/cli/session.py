"""One run of a subcommand: progress and notes on stderr, the result on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nest.cli import signals
from nest.cli.options import Loading, Talking
from nest.cli.progress import ProgressLines, progress_bars
from nest.cli.streams import is_terminal, keep_result, say, silence_stdout
from nest.errors import NestError
from nest.progress import ProgressCallback

if TYPE_CHECKING:
    from nest.models.loading import LoadedModel

EXIT_GATE_FAILED = 3


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
            print(json.dumps(values, allow_nan=False, default=str))
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

    def load(self, model: str, loading: Loading) -> LoadedModel:
        """A model and its tokenizer; what a patch made on it would not fold into is said before the work.

        Raises:
            InputError: no such model, or one that cannot be read.
        """
        from nest import api

        loaded = api.load(
            model,
            dtype=loading.dtype,
            device=loading.device,
            device_map=loading.device_map,
            revision=loading.revision,
            trust_remote_code=loading.trust_remote_code,
        )
        if loading.dtype == "auto":
            return loaded
        stored = api.stored_dtype(model, revision=loading.revision)
        if stored not in (None, next(loaded.model.parameters()).dtype):
            self.warn(
                f"the checkpoint's weights are {str(stored).removeprefix('torch.')}, and --dtype asks for "
                f"{loading.dtype}: a patch is exact in one dtype only, and this one will not fold into "
                "the checkpoint. Leave out --dtype for one that does"
            )
        return loaded


@contextmanager
def session(running: Talking) -> Iterator[Session]:
    """A run's session: bars on stderr where it is a terminal, else a line now and then.

    With every step of progress a stop that got lost is raised again.
    """
    import warnings

    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.showwarning = _show_warning
        show: ProgressCallback | None = None
        if not running.quiet:
            terminal = is_terminal(sys.stderr)
            show = stack.enter_context(progress_bars()) if terminal else ProgressLines()

        def progress(stage: str, done: int, total: int) -> None:
            signals.check()
            if show is not None:
                show(stage, done, total)

        yield Session(running.json, progress, running.quiet)
        signals.check()


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {message}")
