"""The public functions: what the command line and Python users call, a family of verbs a file.

Each takes files, names or plain values, and hands tensors to the stages. Importing it costs nothing.
"""

from __future__ import annotations

from nest.api.comparing import compare
from nest.api.evaluating import evaluate
from nest.api.models import ORGANISM, load, origin_of, resolve_model, stored_dtype
from nest.api.patching import fold, load_patch, revert, verify
from nest.api.selecting import select
from nest.api.tuning import tune, tune_result

__all__ = [
    "ORGANISM",
    "compare",
    "evaluate",
    "fold",
    "load",
    "load_patch",
    "origin_of",
    "resolve_model",
    "revert",
    "select",
    "stored_dtype",
    "tune",
    "tune_result",
    "verify",
]
