"""What has been run: a line a finished run, so that none is ever run again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nest.artifacts.unfinished import Journal
from nest.comparison.plan import Plan
from nest.comparison.task import Outcome, Task, key_of
from nest.errors import InputError


class Ledger:
    """Finished runs by all that they depend on.

    Args:
        plan: Of this comparison.
        identities: Hashes of the model and prompts of each world.
        journal: Takes what is finished from now on.
        finished: Lines of an earlier comparison that this one goes on from.
        retry_failed: Runs that failed count as not run yet.

    Raises:
        InputError: a line tells of an arm or world of the same name that was another then.
    """

    def __init__(
        self,
        plan: Plan,
        identities: Mapping[str, Mapping[str, Any]],
        journal: Journal,
        finished: Sequence[Mapping[str, Any]] = (),
        *,
        retry_failed: bool = False,
    ) -> None:
        self._plan, self._identities, self._journal = plan, identities, journal
        self._lines: dict[str, dict[str, Any]] = {}
        ours = [*journal.entries]
        for line in (*finished, *ours):
            self._check(line)
            self._lines[line["key"]] = dict(line)
        self._again = {
            key
            for key, line in self._lines.items()
            if retry_failed and line["outcome"]["failed"] is not None
        }

    def outcome(self, task: Task) -> Outcome | None:
        """What a run found; None where it has not been run, or is to be run again."""
        key = key_of(self.specification(task))
        line = None if key in self._again else self._lines.get(key)
        return None if line is None else Outcome.from_json(line["outcome"])

    def add(self, task: Task, outcome: Outcome) -> None:
        """A run is finished."""
        specification = self.specification(task)
        key = key_of(specification)
        line = {"key": key, "specification": specification, "outcome": outcome.to_json()}
        self._lines[key] = json.loads(json.dumps(line))
        self._again.discard(key)
        self._journal.add(line)

    def specification(self, task: Task) -> dict[str, Any]:
        """All that a run depends on beside what all of a comparison share."""
        identity = self._identities[task.world]
        parts: tuple[str, ...] = ("model", "training", task.split)
        arm = None if task.stage == "base" else self._plan.settings_of(task.arm, task.seed)
        values = {
            "task": task.to_json(),
            "world": {part: identity[part] for part in parts},
            "arm": arm,
            "stage": self._plan.protocol_of(task.stage),
        }
        return dict(json.loads(json.dumps(values, default=str)))

    def content(self, tasks: Sequence[Task]) -> str:
        """The lines of these runs, in their order, and then of all others, as a file takes them."""
        keys = [key_of(self.specification(task)) for task in tasks]
        others = sorted(set(self._lines) - set(keys))
        kept = (self._lines[key] for key in (*keys, *others) if key in self._lines)
        return "".join(json.dumps(line) + "\n" for line in kept)

    def _check(self, line: Mapping[str, Any]) -> None:
        try:
            then = line["specification"]
            task = Task(**then["task"])
            Outcome.from_json(line["outcome"])
        except (KeyError, TypeError) as fault:
            raise InputError(
                f"a line of the comparison's journal is not of nest ({fault!r}); begin anew with --restart"
            ) from None
        if task.world not in self._identities or (task.arm and task.arm not in self._plan.arms):
            return  # of an arm or world that is left out this time
        now = self.specification(task)
        for what, name in (("arm", task.arm), ("world", task.world)):
            if then[what] != now[what]:
                raise InputError(
                    f"the {what} {name} was another one in the comparison that is gone on with: "
                    f"{_difference(then[what], now[what])}. Give it another name, choose another --out, "
                    "or begin anew with --restart"
                )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a finished comparison's journal; none where there is no such file.

    Raises:
        InputError: it is damaged.
    """
    if not path.is_file():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise InputError(
                f"{path}, line {number} is damaged; choose another --out, or delete it yourself"
            ) from None
    return lines


def _difference(then: Any, now: Any) -> str:
    said = list(_differences("", then, now))
    return "; ".join(said[:3]) + ("; ..." if len(said) > 3 else "")


def _differences(name: str, then: Any, now: Any) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            yield from _differences(f"{name}.{key}" if name else key, then.get(key), now.get(key))
    elif then != now:
        yield f"{name} was {_short(then)} and is {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:16]}...{text[-8:]}"
