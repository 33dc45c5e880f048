"""One declaration a setting: its field, check, flag, TOML key and words all come from it.

A class of settings is a frozen dataclass whose fields say their type, bounds and default, and whose
docstring says what each is for. Its checks are pydantic's, all faults reported together; the command
line (cyclopts) makes a flag and a TOML key of every field and takes its help from the docstring.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args, get_origin

from cyclopts import Parameter
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic.fields import FieldInfo

from nest.errors import InputError

C = TypeVar("C")

Positive = Field(gt=0)
NotNegative = Field(ge=0)
AtLeastOne = Field(ge=1)
Share = Field(gt=0, lt=1)


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def settings(title: str) -> Callable[[type[C]], type[C]]:
    """Make a class of settings: frozen, checked, and no names but its own.

    Args:
        title: Begins what is said of its faults, such as `tuning settings`.
    """

    def made(cls: type[C]) -> type[C]:
        checked = checked_dataclass(
            frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False, title=title)
        )(cls)
        init = checked.__init__

        @wraps(init)
        def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                init(self, *args, **kwargs)
            except ValidationError as fault:
                raise InputError(sentence_of(fault, checked)) from None

        checked.__init__ = checked_init  # type: ignore[method-assign]
        made_of: type[C] = checked  # type: ignore[assignment]
        return made_of

    return made


def kind_of(annotation: Any) -> type | None:
    """The class of settings that a parameter is annotated with; None where it is another kind."""
    kind = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return kind if isinstance(kind, type) and hasattr(kind, "__pydantic_fields__") else None


def sentence_of(fault: ValidationError, kind: type | None = None) -> str:
    """All faults of settings in one sentence: each with its name, the value, and what was expected.

    Args:
        fault: What pydantic found.
        kind: The class of settings, for its bounds and names.
    """
    entries = fault.errors(include_url=False)
    said = [*_lacking(entries)]
    said += [_fault(entry, kind) for entry in entries if entry["type"] != "missing"]
    title = getattr(kind, "__pydantic_config__", {}).get("title") or fault.title
    return f"{title}: " + "; ".join(dict.fromkeys(said))


def meant(name: str, known: Iterable[str]) -> str:
    """What ends a sentence about an unknown name: the one that is nearest, and all there are."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    said = f"; did you mean {near[0]}? There are" if near else "; there are"
    return f"{said} {', '.join(names)}"


def _lacking(entries: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """For each table that lacks settings, which."""
    tables: dict[str, list[str]] = {}
    for entry in entries:
        if entry["type"] == "missing":
            tables.setdefault(_name_of(entry["loc"][:-1]), []).append(str(entry["loc"][-1]))
    for table, names in tables.items():
        yield (f"[{table}] lacks " if table else "missing: ") + ", ".join(names)


def _fault(entry: Mapping[str, Any], settings_kind: type | None) -> str:
    name = _name_of(entry["loc"])
    fields = _fields_at(settings_kind, entry["loc"])
    kind, value, context = entry["type"], entry["input"], entry.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        return f"no such setting: {name}{meant(str(entry['loc'][-1]), fields)}"
    if kind == "value_error":
        return str(context["error"]).removeprefix("sampling settings: ")
    if kind == "string_too_short":
        return f"{name} holds an empty text; leave it out"
    bounds = kind.startswith(("greater_than", "less_than"))
    plain = bounds or kind == "finite_number" or isinstance(value, (int, float))
    what = f"{name} is {value}" if plain else f"{name} is {value!r}"
    if kind == "literal_error":
        return f"{what}; choose {str(context['expected']).replace(chr(39), '')}"
    if kind == "finite_number":
        return f"{what}; it must be a finite number"
    if bounds:
        return f"{what}; it must {_range(fields.get(str(entry['loc'][-1])), context)}"
    kinds = {"float": "a number", "int": "a whole number", "bool": "true or false"}
    kinds |= {"dict": "a table", "dataclass": "a table"}
    expected = kinds.get(kind.partition("_")[0])
    return f"{what}; it must be {expected}" if expected else f"{what}; {_lowered(entry['msg'])}"


def _name_of(loc: Sequence[Any]) -> str:
    """Where an entry stands, such as `world.mine.model`; places in lists are left out."""
    return ".".join(part for part in loc if isinstance(part, str))


def _fields_at(kind: type | None, loc: Sequence[Any]) -> Mapping[str, FieldInfo]:
    """The settings of the class that an entry stands in: `kind`, or one that is nested in it."""
    fields: Mapping[str, FieldInfo] = getattr(kind, "__pydantic_fields__", {})
    parts = list(loc[:-1])
    while parts and parts[0] in fields:
        annotation = fields[parts.pop(0)].annotation
        if get_origin(annotation) is dict:  # tables by name
            del parts[:1]
        fields = getattr(_nested(annotation), "__pydantic_fields__", {})
    return fields


def _nested(annotation: Any) -> type | None:
    """The class of settings in an annotation, such as that of `dict[str, X]` or `X | None`."""
    candidates = (annotation, *get_args(annotation))
    return next((found for found in map(kind_of, candidates) if found is not None), None)


def range_of(field: FieldInfo) -> str:
    """What the bounds of a field ask for, such as `be positive`; empty where it has none."""
    return _range(field, {}) if _bounds(field) else ""


def _bounds(field: FieldInfo) -> dict[str, Any]:
    return {
        name: getattr(part, name)
        for part in _metadata(field)
        for name in ("gt", "ge", "lt", "le")
        if hasattr(part, name)
    }


def _range(field: FieldInfo | None, context: Mapping[str, Any]) -> str:
    """What the bounds of a field ask for, in words."""
    bounds = {**context, **({} if field is None else _bounds(field))}
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if low is not None and high is not None:
        if "gt" in bounds and "lt" in bounds:
            return f"lie between {low:g} and {high:g}"
        opened, closed = "[" if "ge" in bounds else "(", "]" if "le" in bounds else ")"
        return f"lie in {opened}{low}, {high}{closed}"
    if low is not None:
        least = "at least" if "ge" in bounds else "above"
        return "be positive" if bounds.get("gt") == 0 else f"be {least} {low}"
    return f"be {'at most' if 'le' in bounds else 'below'} {high}"


def _metadata(field: FieldInfo) -> Sequence[Any]:
    """What is annotated on a field's type, inside of unions, too."""
    found = list(field.metadata)
    for part in get_args(field.annotation):
        found += [each for one in getattr(part, "__metadata__", ()) for each in _flat(one)]
    return found


def _flat(part: Any) -> Sequence[Any]:
    return part.metadata if isinstance(part, FieldInfo) else (part,)


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


# --- kinds of settings ----------------------------------------------------------------------------


def _layers(value: Any) -> Any:
    """`A:B` as the first layer and the one after the last; either may be left out."""
    if isinstance(value, list) and len(value) == 1:  # as the command line gives it
        (value,) = value
    if not isinstance(value, str):
        return _checked_layers(value)
    first, colon, end = value.partition(":")
    if colon and all(part == "" or part.isdecimal() for part in (first, end)):
        return _checked_layers((int(first or 0), int(end) if end else None))
    raise ValueError(
        f"--layers is {value!r}; it must be A:B, the first layer and the one after the last, such "
        "as 8:24 or 8:"
    )


def _checked_layers(layers: Any) -> Any:
    if layers is None:
        return None
    whole = isinstance(layers, (tuple, list)) and [type(end) for end in layers] in (
        [int, int],
        [int, type(None)],
    )
    if not whole:
        raise ValueError(
            f"layers is {layers!r}; it must be (first, end), end being a number or None"
        )
    if layers[0] < 0 or (layers[1] is not None and layers[0] >= layers[1]):
        raise ValueError(
            f"layers is {range_text(layers)}; the first must be below the end, both from 0"
        )
    return tuple(layers)


def range_text(layers: Sequence[int | None]) -> str:
    """As the command line takes it, such as `8:24` or `8:`."""
    first, end = layers
    return f"{first}:{'' if end is None else end}"


def in_range(layer: int, layers: tuple[int, int | None]) -> bool:
    """Whether a layer is one of `layers[0]` to `layers[1]` - 1; None is no upper end."""
    first, end = layers
    return first <= layer and (end is None or layer < end)


Layers = Annotated[
    tuple[int, int | None] | None,
    BeforeValidator(_layers),
    Parameter(n_tokens=1, accepts_keys=False, negative=(), metavar="A:B"),
]
"""First layer and the layer after the last one (None: to the end); None for all."""


def or_auto(value: Any) -> Any:
    """`auto` as None: what is left to the program."""
    return None if value == "auto" else value


Auto = BeforeValidator(or_auto)
"""On a field that may be None: the command line's word for that is `auto`."""


def as_in(preset: Mapping[str, Any], given: C, default: C, flag: str) -> C:
    """Settings with those of a preset in place of the defaults.

    Args:
        preset: Names and values.
        given: What was asked for.
        default: What is taken where nothing is asked for.
        flag: That asks for the preset, for what is said.

    Raises:
        InputError: something else was asked for, too.
    """
    for name, value in preset.items():
        found = getattr(given, name)
        if found not in (getattr(default, name), value):
            sets = f"leaves {name} open" if value is None else f"sets {name} to {value}"
            raise InputError(
                f"{flag} {sets}, and {name} {found} was given, too; leave one of them out"
            )
    changed: C = replace(given, **preset)  # type: ignore[type-var]
    return changed
