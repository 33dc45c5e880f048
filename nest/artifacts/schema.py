"""What stands in a manifest, entry by entry: checked when it is read, and nothing else let through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from nest.errors import NestError

E = TypeVar("E", bound="Entry")

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Entry(BaseModel):
    """A part of a manifest. Entries that a newer nest may have added are left alone."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


def read_entry(kind: type[E], values: Mapping[str, Any], fault: type[NestError], mend: str) -> E:
    """A part of a manifest, checked.

    Args:
        kind: What it must be.
        values: As JSON gives it.
        fault: Class of the error.
        mend: Ends its sentence.

    Raises:
        NestError: of that class: an entry is missing or of another type, named by its path.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as found:
        first = found.errors(include_url=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        raise fault(
            f"manifest.json lacks or garbles the entry '{path}' ({first['msg'].lower()}); {mend}"
        ) from None
