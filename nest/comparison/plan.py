"""What is compared: arms on worlds over seeds, checked before any work."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from nest.comparison.arms import ARMS, Arm, made_arm
from nest.errors import InputError
from nest.evaluation.config import EvaluationConfig
from nest.selection.config import SelectionConfig
from nest.settings import AtLeastOne, Layers, Positive, meant, settings
from nest.tuning.config import TuningConfig
from nest.worlds.build import RECIPES

if TYPE_CHECKING:
    from nest.methods.method import Method

Split = Literal["development", "test"]
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]

DEFAULT_EVALUATION: Mapping[str, Any] = {"max_new_tokens": 40, "benign_twin_prompts": 0}
NOT_HERE = {
    "selecting": ("seed", "layers"),
    "tuning": ("seed", "layers", "learning_rate", "update", "mode"),
    "evaluation": ("benign_twin_prompts", "samples"),
}
"""What the plan's own entries and the arms decide."""


@settings("[sweep] of the comparison")
class Sweep:
    """Every arm tries its four settings on development splits, and keeps the best.

    Attributes:
        worlds: Where; by default those whose role is to be chosen on.
        seed: Of these runs; it must be none of those that are reported.
    """

    worlds: tuple[str, ...] = ()
    seed: Seed = 1000


@settings("[front] of the comparison")
class Front:
    """Every arm is run again with other weights on benign answers, so that arms can be ranked.

    Attributes:
        weights: What the weights of benign answers (cross-entropy and KL) are multiplied with, beside 1.
        worlds: Where; all by default.
        seeds: With which; the first by default.
    """

    weights: Annotated[tuple[Annotated[float, Positive], ...], Field(min_length=1)] = (0.3, 3.0)
    worlds: tuple[str, ...] = ()
    seeds: tuple[Seed, ...] = ()


@settings("[anytime] of the comparison")
class Anytime:
    """Attack success on the development split while an arm trains, against its seconds.

    Attributes:
        level: The attack success, mean over attacks, that is to be reached.
        behaviours: At most so many harmful prompts are asked each time.
        worlds: Where; by default those whose role is to be chosen on, or all where none is.
        seeds: With which; the first by default.
    """

    level: Annotated[float, Field(ge=0, le=1)] = 0.1
    behaviours: Annotated[int, AtLeastOne] = 40
    worlds: tuple[str, ...] = ()
    seeds: tuple[Seed, ...] = ()


@settings("[robustness] of the comparison")
class Robustness:
    """The treated model is fine-tuned, all of it, on benign dialogues and on harmful ones that comply.

    Attributes:
        steps: After how many optimizer steps it is measured.
        learning_rate: Of AdamW, constant.
        batch_size: Dialogues a step.
        behaviours: At most so many harmful prompts are asked each time.
        worlds: Where; by default those whose role is to be chosen on, or all where none is.
        seeds: With which; the first by default.
    """

    steps: Annotated[tuple[Annotated[int, AtLeastOne], ...], Field(min_length=1)] = (
        *(1, 2, 5, 10, 20, 50),
    )
    learning_rate: Annotated[float, Positive] = 1e-4
    batch_size: Annotated[int, AtLeastOne] = 16
    behaviours: Annotated[int, AtLeastOne] = 40
    worlds: tuple[str, ...] = ()
    seeds: tuple[Seed, ...] = ()


@settings("a world's held-out prompts")
class HeldOut:
    """Where the prompts of a split are, as files or named sets.

    Attributes:
        harmful: Prompts that should be refused.
        borderline: Harmless prompts that sound harmful.
        benign: Dialogues with the one good answer, for exact match and KL.
        attacks: As `nest eval --attacks` takes them; the bare prompt is always asked as well.
    """

    harmful: str
    borderline: str
    benign: str
    attacks: str = "none"


@settings("[world.NAME] of the comparison")
class OwnWorld:
    """A model of the user's with data to learn from and splits to be measured on.

    Attributes:
        model: A local folder, or a name on the Hub.
        unsafe: Prompts that should be refused, to find neurons with.
        safe: Prompts that should be answered, about as many.
        harmful: Prompts with the refusals to give.
        benign: Prompts with their good answers.
        complying: Harmful prompts with complying answers, for the fine-tuning that undoes an arm.
        development: What settings are chosen on.
        test: What `--final` is measured on.
        role: Whether settings may be chosen on its development split.
        layers: First layer to treat and the layer after the last one; None for all.
        dtype: `auto` keeps the checkpoint's.
        revision: Of a model on the Hub.
        system: System prompt put before every prompt that has none of its own.
        template_kwargs: Switches of the chat template.
        prompts: At most so many prompts of every held-out set, evenly spread; None takes all.
    """

    model: str
    unsafe: str
    safe: str
    harmful: str
    benign: str
    development: HeldOut
    test: HeldOut | None = None
    complying: str | None = None
    role: Literal["choosing", "final"] = "final"
    layers: Layers = None
    dtype: str = "auto"
    revision: str | None = None
    system: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    prompts: Annotated[int, AtLeastOne] | None = None


@settings("the comparison")
class Plan:
    """All that a comparison depends on but the weights and prompts themselves.

    Attributes:
        worlds: Names of worlds of ours, or of tables `[world.NAME]`.
        arms: Names of arms of ours, or of tables `[arm.NAME]`.
        seeds: Of selection and training.
        title: Of the report.
        judge: As `nest eval --judge` takes it; the first one counts.
        reference: The arm that the others are tested against; the first by default.
        resamples: Of the bootstrap and of the permutation tests.
        threads: Of torch, a worker; with another number results can differ in their last bits.
        selecting: `SelectionConfig` of all arms that select neurons.
        tuning: `TuningConfig` of all arms that train.
        evaluation: `EvaluationConfig`.
        sweep, front, anytime, robustness: Each is left out where its table is.
        world: Worlds of the user's, by name.
        arm: Arms of the user's, by name: `method`, and that method's settings.
    """

    worlds: Annotated[tuple[str, ...], Field(min_length=1)]
    arms: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    title: str = ""
    judge: str = "phrases"
    reference: str | None = None
    resamples: Annotated[int, Field(ge=100)] = 2000
    threads: Annotated[int, AtLeastOne] = 1
    selecting: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    sweep: Sweep | None = None
    front: Front | None = None
    anytime: Anytime | None = None
    robustness: Robustness | None = None
    world: dict[str, OwnWorld] = field(default_factory=dict)
    arm: dict[str, dict[str, Any]] = field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> Plan:
        for what, values in (("worlds", self.worlds), ("arms", self.arms), ("seeds", self.seeds)):
            _check_once(what, values)
        _check_known("world", self.worlds, (*RECIPES, *self.world))
        _check_known("arm", self.arms, (*ARMS, *self.arm))
        _check_known("arm", [self.reference] if self.reference else [], self.arms)
        for stage in ("sweep", "front", "anytime", "robustness"):
            self._check_stage(stage)
        if self.sweep is not None:
            self._check_sweep()
        for table, reserved in NOT_HERE.items():
            for name in reserved:
                if name in getattr(self, table):
                    raise ValueError(
                        f"[{table}] sets {name}, which the plan's own entries or its arms decide; "
                        "leave it out"
                    )
        self.selection_config(self.seeds[0])
        self.tuning_config(self.seeds[0])
        self.evaluation_config()
        for name in (*self.arms, *self.arm):
            self._check_arm(name)
        return self

    def _check_stage(self, stage: str) -> None:
        table = getattr(self, stage)
        if table is None:
            return
        lists = {
            name: getattr(table, name)
            for name in ("worlds", "seeds", "weights", "steps")
            if hasattr(table, name)
        }
        for name, values in lists.items():
            _check_once(f"[{stage}] {name}", values)
        _check_known("world", table.worlds, self.worlds)
        if stage == "front":
            strange = [seed for seed in table.seeds if seed not in self.seeds]
            if strange or 1.0 in table.weights:
                raise ValueError(
                    f"[front] has the seeds {list(table.seeds)} and the weights {list(table.weights)}; its "
                    f"seeds must be of the plan's {list(self.seeds)}, whose runs are its points of weight 1"
                )

    def _check_arm(self, name: str) -> None:
        try:
            arm = self.arm_of(name)
            self.made(name, self.seeds[0])
        except InputError as fault:
            said, what = str(fault), f"[arm.{name}]"
            raise ValueError(said if said.startswith(what) else f"{what}: {said}") from None
        own = [world for world in self.worlds if world in self.world]
        if name in self.arms and arm.harmful == "plain" and own:
            raise ValueError(
                f"the arm {name} learns from bare prompts alone, and the world {own[0]} has one set of "
                "harmful prompts; leave the arm out, or make a world of its own of the bare ones"
            )

    def _check_sweep(self) -> None:
        assert self.sweep is not None
        if self.sweep.seed in self.seeds:
            raise ValueError(
                f"[sweep] has the seed {self.sweep.seed}, which is reported, too; give another one"
            )
        finals = [name for name in self.sweep.worlds if self.role_of(name) != "choosing"]
        if finals:
            raise ValueError(
                f"[sweep] names {', '.join(finals)}, which settings may not be chosen on; name "
                "worlds whose role is choosing"
            )
        if not self.choosing():
            raise ValueError(
                "[sweep] needs a world to choose on: name bazaar or harbour, give one of yours "
                'role = "choosing", or leave [sweep] out'
            )

    # --- what it comes to -------------------------------------------------------------------------

    @property
    def compared_with(self) -> str:
        """The arm that the others are tested against."""
        return self.reference or self.arms[0]

    def arm_of(self, name: str) -> Arm:
        """An arm of ours or of the user's.

        Raises:
            InputError: settings that its method does not have.
        """
        return made_arm(name, self.arm[name]) if name in self.arm else ARMS[name]

    def made(self, name: str, seed: int) -> Method:
        """An arm's method with a seed, at its own value of the setting that is swept.

        Raises:
            InputError: settings that the method does not have.
        """
        return self.arm_of(name).made(
            tuning=self.tuning_config(seed), selecting=self.selection_config(seed), seed=seed
        )

    def settings_of(self, name: str, seed: int) -> dict[str, Any]:
        """All that an arm's runs depend on, defaults included, so that other defaults are another arm.

        What is left open (None) is not in it, so that a setting that comes later leaves old runs what they
        were; where None stands for something that could change, that is in it.
        """
        from nest.methods.neurons import Neurons

        arm, method = self.arm_of(name), self.made(name, seed)
        values = asdict(method)  # type: ignore[call-overload]
        del values["name"]
        if isinstance(method, Neurons):
            values["tuning"]["start"] = method.trained.resolved_start
        else:
            values["tuning"].pop("start", None)  # no other method's runs depend on it
        if selecting := values.get("selecting"):
            counts, rows = values.get("parameters") == "neurons", values.get("rows") == "selected"
            if not (isinstance(method, Neurons) or counts or rows):
                del values["selecting"]
            selecting["scorer"] = values.get("scorer") or selecting["scorer"]
            found = SelectionConfig(**selecting).resolved(dialogues=True)
            selecting |= asdict(found)
            values.pop("scorer", None)
            if found.scorer != "learned":
                del selecting["learning_epochs"]
        return {"method": arm.method, "harmful": arm.harmful, **_without_none(values)}

    def tried_by(self, name: str) -> tuple[str, tuple[float, ...]]:
        """The setting that an arm is swept along, and what it tries; nothing where the arm sets it."""
        return self.arm_of(name).tried()

    def values(self) -> dict[str, Any]:
        """All of it as plain values, from which the same plan can be made."""
        return dict(json.loads(json.dumps(asdict(self), default=str)))

    def without_folders(self) -> dict[str, Any]:
        """The same with files by their names alone: where they lie is nobody's business."""

        def bare(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: bare(entry) for key, entry in value.items()}
            is_path = isinstance(value, str) and Path(value).is_absolute()
            return Path(value).name if is_path else value

        values = self.values()
        return {**values, "world": bare(values["world"])}

    def role_of(self, world: str) -> str:
        """`choosing` or `final`."""
        return self.world[world].role if world in self.world else RECIPES[world].role

    def choosing(self) -> tuple[str, ...]:
        """The worlds that settings may be chosen on."""
        return tuple(name for name in self.worlds if self.role_of(name) == "choosing")

    def selection_config(self, seed: int) -> SelectionConfig:
        return SelectionConfig(**self.selecting, seed=seed)

    def tuning_config(self, seed: int) -> TuningConfig:
        config = TuningConfig(**self.tuning, seed=seed)
        # What is left to the memory that happens to be free would not be the same again.
        size = config.micro_batch_size or config.batch_size
        return replace(config, micro_batch_size=size)

    def evaluation_config(self) -> EvaluationConfig:
        return EvaluationConfig(**{**DEFAULT_EVALUATION, **self.evaluation})

    def worlds_of(self, stage: str) -> tuple[str, ...]:
        """Where a stage runs."""
        table = getattr(self, stage)
        if table.worlds:
            return tuple(table.worlds)
        return self.worlds if stage == "front" else self.choosing() or self.worlds

    def seeds_of(self, stage: str) -> tuple[int, ...]:
        """With which seeds a stage runs."""
        return tuple(getattr(self, stage).seeds) or self.seeds[:1]

    def protocol(self) -> dict[str, Any]:
        """What all runs share, and what another comparison may not differ in to go on with them.

        Raises:
            InputError: no such judge.
        """
        from nest.judging.makers import make_judges

        shared = {
            "judges": [[judge.name, judge.sha256] for judge in make_judges(self.judge)],
            "evaluation": asdict(self.evaluation_config()),
            "threads": self.threads,
        }
        return dict(json.loads(json.dumps(shared)))

    def protocol_of(self, stage: str) -> dict[str, Any]:
        """What the runs of a stage depend on beside that."""
        if stage not in ("anytime", "robustness"):
            return {}
        table = getattr(self, stage)
        values = {} if table is None else asdict(table)
        return {name: values[name] for name in values if name not in ("worlds", "seeds")}


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }


def _check_once(what: str, values: Sequence[Any]) -> None:
    twice = sorted({str(value) for value in values if list(values).count(value) > 1})
    if twice:
        raise ValueError(f"{what} names {', '.join(twice)} twice; name each once")


def _check_known(kind: str, names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"there is no {kind} {name!r}{meant(name, known)}")
