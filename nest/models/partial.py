"""Run a model only as far as it is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class _Reached(BaseException):
    """Ends a forward pass; no `Exception`, so that no model's own handler takes it for a fault."""

    def __init__(self, token: object) -> None:
        super().__init__()
        self.token = token


def run_until(last: nn.Module, call: Callable[[], object], *, before: bool = False) -> bool:
    """Call something that runs a model, and end it as soon as one of the model's modules has run.

        run_until(model.layers[3], lambda: model(input_ids=input_ids))

    Hooks that the module has already are called first, so that they see its output (its arguments,
    with `before`). The hook of this function is gone afterwards, also after an error. What the model
    would have done after the module is not done: nothing of it should be needed, such as a cache.

    Args:
        last: The module to end with. Where it runs more than once, its first run is the end.
        call: Runs the model; its result is lost.
        before: End before the module runs and not after it.

    Returns:
        Whether the module was reached; if not, `call` ran to its end.
    """
    token = object()

    def stop(*_: Any) -> None:
        # A new exception each time: one that is kept would keep the frames of the forward pass, and
        # with them its tensors.
        raise _Reached(token)

    register = last.register_forward_pre_hook if before else last.register_forward_hook
    handle = register(stop)
    try:
        call()
    except _Reached as reached:
        if reached.token is not token:  # that of another call around this one
            raise
        return True
    finally:
        handle.remove()
    return False
