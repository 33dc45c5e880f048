"""What decides a capture. Imports no torch: the command line reads it."""

from __future__ import annotations

from typing import Literal

Pool = Literal["max", "mean", "last"]
"""How a neuron's activations over the tokens of a prompt become one number."""
