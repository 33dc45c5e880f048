"""accelerate keeps precision and device for the whole process: each test begins, and leaves, without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def without_accelerates_state() -> Iterator[None]:
    state = pytest.importorskip("accelerate.state", reason="accelerate is not installed")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
