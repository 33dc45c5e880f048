"""The comparison: every stage's runs, spread over workers, with what is finished kept line by line."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from nest.artifacts.storage import check_output
from nest.artifacts.unfinished import Unfinished, beside
from nest.comparison.choices import Choice, chosen
from nest.comparison.folder import KIND, earlier_runs, write_folder
from nest.comparison.ledger import Ledger
from nest.comparison.plan import Plan, Split
from nest.comparison.result import Comparison, Run
from nest.comparison.statistics import holm
from nest.comparison.subjects import WorldFacts, facts_of, material_of
from nest.comparison.task import Outcome, Stage, Task
from nest.comparison.workers import Workers
from nest.errors import EngineError, InputError
from nest.progress import ProgressCallback

COMPLIES_WITH_ALL = 0.99


def run_comparison(
    plan: Plan,
    out: str | Path,
    *,
    final: bool = False,
    workers: int | Literal["auto"] = "auto",
    device: str = "auto",
    restart: bool = False,
    retry_failed: bool = False,
    command: str = "",
    progress: ProgressCallback | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Run what has not been run yet, and write the folder of results.

    Args:
        plan: What is compared.
        out: The folder. Where it holds a comparison of the same protocol, its runs are not run again.
        final: Measure on the test splits, which nothing was chosen on; the results say so.
        workers: Processes; `auto` takes one a GPU, or as many as the cores have room for.
        device: auto, cpu, cuda, ...
        restart: Begin anew: neither the unfinished work of an earlier call beside the folder nor the
            runs in it are gone on with.
        retry_failed: Run those of them again that failed.
        command: What the report says that this is made by.
        progress: Called with stage, runs done, runs in all.
        warn: Told what deserves attention.

    Raises:
        InputError: a world, an arm or a judge that cannot be used, or another comparison in the folder.
        EngineError: a worker died over the same run again and again; all others are done, and kept.
    """
    out = Path(out)
    devices = devices_for(device, workers, plan.threads)
    holm({"a": 1.0})  # what is missing is said now, and not after hours
    identity = {"protocol": plan.protocol(), "final": final}
    earlier = [] if restart else earlier_runs(out, identity, warn)
    check_output(out, kind=KIND, overwrite=True)
    # before anything is thrown away
    materials = [material_of(plan, name, final=final) for name in plan.worlds]
    with Unfinished(beside(out), restart=restart, warn=warn) as work:
        work.begin(KIND, identity)
        worlds = {one.name: facts_of(plan, one, progress=progress) for one in materials}
        _warn_of_leaks(worlds, warn)
        ledger = Ledger(
            plan,
            {name: facts.identity for name, facts in worlds.items()},
            work.journal,
            earlier,
            retry_failed=retry_failed,
        )
        with Workers(plan.values(), devices, plan.threads) as pool:
            found = _Stages(plan, final, ledger, pool, progress, warn).run()
        comparison = Comparison(plan, final, worlds, *found)
        write_folder(
            comparison,
            out,
            journal=ledger.content([run.task for run in comparison.runs]),
            identity=identity,
            made={"command": command, "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"},
        )
    return comparison


def _warn_of_leaks(worlds: Mapping[str, WorldFacts], warn: Callable[[str], None]) -> None:
    """Say where held-out harmful prompts are near-duplicates of what is learned from or chosen on."""
    for name, facts in worlds.items():
        for what, overlap in facts.overlaps.items():
            if what.split()[1] == "harmful":
                warn(
                    f"in the world {name} {overlap['n']} of {overlap['of']} prompts of {what} are "
                    "near-duplicates: what is measured on them is not held out"
                )


def devices_for(device: str, workers: int | Literal["auto"], threads: int) -> list[str]:
    """A device for each worker.

    Raises:
        InputError: no such device.
    """
    from nest.models.loading import resolve_device

    kind = str(resolve_device(device))
    if kind == "cuda":
        import torch

        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        return [
            gpus[index % len(gpus)] for index in range(len(gpus) if workers == "auto" else workers)
        ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    room = max(1, (cores or 1) // threads) if kind == "cpu" else 1
    return [kind] * (room if workers == "auto" else workers)


class _Stages:
    """The runs of all stages, one stage after the other."""

    def __init__(
        self,
        plan: Plan,
        final: bool,
        ledger: Ledger,
        pool: Workers,
        progress: ProgressCallback | None,
        warn: Callable[[str], None],
    ) -> None:
        self._plan, self._ledger, self._pool, self._warn = plan, ledger, pool, warn
        self._progress = progress or (lambda stage, done, total: None)
        self._split: Split = "test" if final else "development"
        self._runs: list[Run] = []
        self._total, self._done_so_far = n_runs(plan), 0

    def run(self) -> tuple[dict[str, Choice], tuple[Run, ...]]:
        """What was chosen, and every run."""
        plan, arms = self._plan, self._plan.arms
        base = [Task("base", world, split=self._split) for world in plan.worlds]
        for task, outcome in self._done(base).items():
            self._check_base(task.world, outcome)
        choices = self._choose()
        knobs = {arm: choices[arm].value for arm in arms}
        self._done(
            [
                Task("main", world, arm, seed, knobs[arm], split=self._split)
                for world in plan.worlds
                for arm in arms
                for seed in plan.seeds
            ]
        )
        if plan.front is not None:
            self._done(
                [
                    Task("front", world, arm, seed, knobs[arm], weight, self._split)
                    for world in plan.worlds_of("front")
                    for arm in arms
                    for weight in plan.front.weights
                    for seed in plan.seeds_of("front")
                ]
            )
        stages: tuple[Stage, ...] = ("anytime", "robustness")
        for stage in stages:
            if getattr(plan, stage) is not None:
                self._done(
                    [
                        Task(stage, world, arm, seed, knobs[arm])
                        for world in plan.worlds_of(stage)
                        for arm in arms
                        for seed in plan.seeds_of(stage)
                    ]
                )
        return choices, tuple(self._runs)

    def _choose(self) -> dict[str, Choice]:
        """Every arm's setting, by its own runs on development splits."""
        plan = self._plan
        tried = {arm: plan.tried_by(arm) for arm in plan.arms}
        if plan.sweep is None:
            return {arm: Choice(knob, None) for arm, (knob, _) in tried.items()}
        worlds, seed = plan.worlds_of("sweep"), plan.sweep.seed
        tasks = {
            (arm, value, world): Task("sweep", world, arm, seed, value)
            for arm, (_, values) in tried.items()
            for value in values
            for world in worlds
        }
        outcomes = self._done(list(tasks.values()))
        choices = {}
        for arm, (knob, values) in tried.items():
            found = {
                value: {world: outcomes[tasks[arm, value, world]] for world in worlds}
                for value in values
            }
            choices[arm] = chosen(knob, found) if found else Choice(knob, None)
        return choices

    def _done(self, tasks: Sequence[Task]) -> dict[Task, Outcome]:
        """What these runs found; those that are not done yet are run.

        Raises:
            EngineError: a worker died over a run again and again.
        """
        found = {task: self._ledger.outcome(task) for task in tasks}
        left = [task for task, outcome in found.items() if outcome is None]
        self._done_so_far = len(self._runs) + len(tasks) - len(left)
        died: list[str] = []
        self._tell()
        for task, outcome in self._pool.run(left, beat=self._tell, warn=self._warn):
            if isinstance(outcome, str):
                died.append(f"{task.name} ({outcome})")
                continue
            self._ledger.add(task, outcome)
            found[task] = self._ledger.outcome(task)  # as it is read again
            self._done_so_far += 1
            self._tell()
            if outcome.failed is not None:
                self._warn(f"{task.name}: {outcome.failed}")
        if died:
            raise EngineError(
                f"a worker died twice over {len(died)} of the runs: {'; '.join(died[:3])}"
                f"{'; ...' if len(died) > 3 else ''}. All other runs up to here are done, and kept. "
                "Where memory ran out, take fewer workers (--workers 1) or a smaller batch; then repeat "
                "the command"
            )
        whole = {task: outcome for task, outcome in found.items() if outcome is not None}
        self._runs += [Run(task, outcome) for task, outcome in whole.items()]
        return whole

    def _tell(self) -> None:
        self._progress("compare", self._done_so_far, self._total)

    def _check_base(self, world: str, outcome: Outcome) -> None:
        """Refuse a world in which there is nothing to be made safer.

        Raises:
            InputError: its model complies with nothing.
        """
        if outcome.failed is not None:
            raise InputError(f"the model of the world {world} cannot be measured: {outcome.failed}")
        rates = list(outcome.figures["by_attack"].values())
        if max(rates) == 0.0:
            raise InputError(
                f"the model of the world {world} complies with no harmful prompt at all, under no attack: "
                "there is nothing to compare on it. Give other harmful prompts or attacks, or leave it out"
            )
        if min(rates) >= COMPLIES_WITH_ALL:
            self._warn(
                f"the model of the world {world} complies with every harmful prompt, bare ones too: it has "
                "no refusals that neurons could be found by other than what the prompts ask for"
            )


def n_runs(plan: Plan) -> int:
    """How many runs a comparison has, where all goes well."""
    count = len(plan.worlds) * (1 + len(plan.arms) * len(plan.seeds))
    if plan.sweep is not None:
        n_worlds = len(plan.worlds_of("sweep"))
        count += n_worlds * sum(len(plan.tried_by(arm)[1]) for arm in plan.arms)
    for stage, times in (
        ("front", len(plan.front.weights) if plan.front else 0),
        ("anytime", 1),
        ("robustness", 1),
    ):
        if getattr(plan, stage) is not None:
            count += times * len(plan.worlds_of(stage)) * len(plan.seeds_of(stage)) * len(plan.arms)
    return count
