"""How the stages say how far they are."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[[str, int, int], None]
"""Called with the stage's name, the steps done and the steps in all."""
