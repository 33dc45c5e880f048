"""What the tests of comparisons share besides fixtures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FAKE = Path(__file__).with_name("fake_worker.py")


def write_prompts(path: Path, prompts: list[str], response: str | None = None) -> None:
    rows = [{"prompt": p} | ({} if response is None else {"response": response}) for p in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def asked(log: Path) -> list[str]:
    """The runs that were asked for so far."""
    return log.read_text(encoding="utf-8").split() if log.exists() else []


def merged(values: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {**values, **changes}
