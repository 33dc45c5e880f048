"""docs/plan.md: every key of a comparison's plan, from the settings classes that check it."""

from __future__ import annotations

import json
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from docstring_parser import DocstringStyle, parse

from nest.comparison.arms import ARMS, NEURONS_ALONE, Arm
from nest.comparison.plan import (
    DEFAULT_EVALUATION,
    NOT_HERE,
    Anytime,
    Front,
    HeldOut,
    OwnWorld,
    Plan,
    Robustness,
    Sweep,
)
from nest.evaluation.config import EvaluationConfig
from nest.methods.makers import METHODS, SHARED
from nest.selection.config import SelectionConfig
from nest.settings import kind_of, range_of
from nest.tuning.config import TuningConfig
from nest.worlds.build import RECIPES

PLAN = Path(__file__).parents[1] / "docs" / "plan.md"
STAGES = {"sweep": Sweep, "front": Front, "anytime": Anytime, "robustness": Robustness}
SHARED_TABLES = {
    "selecting": SelectionConfig,
    "tuning": TuningConfig,
    "evaluation": EvaluationConfig,
}
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "table"}
INTRO = """\
What `nest compare --config FILE.toml` reads; README has an example. The plain keys come first: in TOML a
table takes all keys that follow its head. None is what a key is when it is left out. A key that does not
stand here is refused."""

MICRO_BATCHES = (
    " In a comparison a `micro_batch_size` that is left out is the `batch_size`, "
    "whatever memory is free."
)


def render() -> str:
    """The document."""
    tables = (*STAGES, "world", "arm")
    parts = ["# The plan of a comparison", INTRO]
    parts += ["## Plain keys", _keys(Plan, leave_out=tables)]
    for name, kind in STAGES.items():
        parts += [f"## [{name}]", _said(kind), _keys(kind)]
    parts += list(_worlds())
    parts += list(_arms())
    parts.append("## Methods")
    for name, kind in METHODS.items():
        tried = ", ".join(f"{value:g}" for value in kind.tried)
        parts += [f"### {name}", f"{_said(kind)} `[sweep]` tries `{kind.knob}` at {tried}."]
        parts.append(_keys(kind, leave_out=SHARED))
    for name, kind in SHARED_TABLES.items():
        changed = DEFAULT_EVALUATION if name == "evaluation" else {}
        note = MICRO_BATCHES if name == "tuning" else ""
        parts += [f"## [{name}]", f"{_said(kind)}{note}"]
        parts.append(_keys(kind, NOT_HERE[name], changed))
    return "<!-- made by make docs -->\n" + "\n\n".join(parts) + "\n"


def _worlds() -> Iterator[str]:
    yield "## [world.NAME]"
    yield f"{_said(OwnWorld)} `[every_world]` has the same keys, for all worlds that do not say otherwise."
    yield _keys(OwnWorld)
    yield "### [world.NAME.development] and [world.NAME.test]"
    yield _said(HeldOut)
    yield _keys(HeldOut)
    yield "### Worlds of ours"
    yield _table(("name", "role"), [(f"`{name}`", one.role) for name, one in RECIPES.items()])


def _arms() -> Iterator[str]:
    yield "## [arm.NAME]"
    yield (
        "An arm of your own: these keys, and beside them the settings of its method. Its table `tuning` "
        f"sets {', '.join(f'`{name}`' for name in NEURONS_ALONE)} for the method `neurons` alone."
    )
    said = {**_attributes(Arm), "method": "One of the methods below."}
    own = {
        "method": "**required**",
        "label": "its name",
        "kind": '`"baseline"`',
        "harmful": '`"wrapped"`',
        "selecting": "-",
        "tuning": "-",
    }
    rows = [(f"`{name}`", default, said[name]) for name, default in own.items()]
    yield _table(("key", "default", "what it is"), rows)
    yield "### Arms of ours"
    rows = [
        (f"`{arm.name}`", arm.label, arm.kind, f"`{arm.method}`", _settings_of(arm))
        for arm in ARMS.values()
    ]
    yield _table(("name", "label", "kind", "method", "settings"), rows)


def _settings_of(arm: Arm) -> str:
    values = dict(arm.values) | ({} if arm.harmful == "wrapped" else {"harmful": arm.harmful})
    for table, changes in (("selecting", arm.selecting), ("tuning", arm.tuning)):
        values |= {f"{table}.{name}": value for name, value in changes.items()}
    return ", ".join(f"`{name} = {json.dumps(value)}`" for name, value in values.items())


def _keys(
    kind: type[Any], leave_out: Collection[str] = (), defaults: Mapping[str, Any] | None = None
) -> str:
    """A row for each setting of a class."""
    said, rows = _attributes(kind), []
    for name, one in kind.__pydantic_fields__.items():
        if name in leave_out:
            continue
        range_ = range_of(one)
        takes = _takes(one.annotation) + (f"; must {range_}" if range_ else "")
        default = (defaults or {}).get(name, one.get_default(call_default_factory=True))
        told = "**required**" if one.is_required() else _default(default)
        rows.append((f"`{name}`", takes, told, said[name]))
    return _table(("key", "takes", "default", "what it is"), rows)


def _takes(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_takes(one) for one in arguments if one is not type(None))
    if origin is tuple:
        if arguments[-1] is not Ellipsis:
            return '`[first, end]` or `"first:end"`'
        return f"list of {_takes(arguments[0])}s"
    if hasattr(annotation, "__metadata__"):
        return _takes(arguments[0])
    if kind_of(annotation) is not None:
        return "table"
    return WORDS[origin or annotation]


def _default(value: Any) -> str:
    if value is None or value == () or value == {}:
        return "-"
    return f"`{json.dumps(value)}`"


def _said(kind: type[Any]) -> str:
    """What the class says of itself in its first sentence."""
    return _line(parse(kind.__doc__ or "", DocstringStyle.GOOGLE).short_description or "")


def _attributes(kind: type[Any]) -> dict[str, str]:
    """What the class says of each of its settings; several can have one entry."""
    found = parse(kind.__doc__ or "", DocstringStyle.GOOGLE).params
    return {
        name: _line(one.description or "") for one in found for name in one.arg_name.split(", ")
    }


def _line(text: str) -> str:
    return " ".join(text.split())


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
