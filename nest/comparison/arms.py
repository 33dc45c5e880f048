"""The arms that come with us: methods, ablations of ours, and controls, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from nest.errors import InputError
from nest.methods.makers import METHODS, make_method
from nest.methods.method import Method
from nest.selection.config import SelectionConfig
from nest.settings import meant
from nest.tuning.config import TuningConfig

C = TypeVar("C", TuningConfig, SelectionConfig)
NEURONS_ALONE = (
    *("layers", "update", "mode", "start", "checkpointing", "cache_prefix", "learning_rate"),
)
"""Settings of training that are those of the cluster update."""
Kind = Literal["ours", "baseline", "control"]


@dataclass(frozen=True)
class Arm:
    """One row of the comparison.

    Attributes:
        name: Key in the results.
        label: Row of the tables.
        method: One of `nest.methods.makers.METHODS`.
        values: Settings of that method.
        harmful: `wrapped`: learns from harmful prompts in the training wrappers, too; `plain`: from bare
            ones alone. A world of the user's has one set only.
        kind: For tables and plots: `ours`, `baseline` or `control`.
        selecting: What is another than in the plan's `[selecting]`.
        tuning: What is another than in the plan's `[tuning]`.
    """

    name: str
    label: str
    method: str
    values: Mapping[str, Any] = field(default_factory=dict)
    harmful: str = "wrapped"
    kind: Kind = "baseline"
    selecting: Mapping[str, Any] = field(default_factory=dict)
    tuning: Mapping[str, Any] = field(default_factory=dict)

    def tried(self) -> tuple[str, tuple[float, ...]]:
        """The setting that it is swept along, and what is tried; nothing where its values say it."""
        kind = METHODS[self.method]
        is_set = kind.knob in self.values or "learning_rate" in self.tuning
        return kind.knob, () if is_set else kind.tried

    def made(self, *, tuning: TuningConfig, selecting: SelectionConfig, seed: int) -> Method:
        """The method, ready to be applied.

        Raises:
            InputError: settings that it does not have.
        """
        return make_method(
            self.method,
            dict(self.values),
            name=self.name,
            tuning=_with(tuning, self.tuning),
            selecting=_with(selecting, self.selecting),
            seed=seed,
        )


def _arm(name: str, label: str, method: str, kind: Kind = "baseline", **values: Any) -> Arm:
    return Arm(name, label, method, values, kind=kind)


PROBE: Mapping[str, Any] = {"method": "neurons", "kind": "ours", "scorer": "probe"}
SHARED: Mapping[str, Any] = {"update": "shared"}
FOUR: Mapping[str, Any] = {"max_clusters": 4}

ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        _arm("neurons", "neurons (the default)", "neurons", "ours"),
        _arm("paper", "by probe, shared", **PROBE, update="shared"),
        _arm("probe", "neurons by probe", **PROBE),
        _arm("contrast", "neurons by mean difference", "neurons", "ours", scorer="contrast"),
        _arm("effect", "neurons by effect", "neurons", "ours", scorer="effect"),
        _arm("learned", "learned neurons", "neurons", "ours", scorer="learned"),
        Arm("clusters", "up to four clusters a site", "neurons", kind="ours", selecting=FOUR),
        Arm(
            "shared",
            "up to four clusters a site, shared",
            "neurons",
            SHARED,
            kind="ours",
            selecting=FOUR,
        ),
        _arm("separate", "separate neurons (as in SN-Tune)", "neurons", separate=True),
        _arm("random", "random neurons", "neurons", "control", control="random_neurons"),
        Arm(
            "random_shared",
            "random neurons in clusters, shared",
            "neurons",
            {**SHARED, "control": "random_neurons"},
            kind="control",
            selecting=FOUR,
        ),
        Arm(
            "random_clusters",
            "random clusters",
            "neurons",
            {"control": "random_clusters"},
            kind="control",
            selecting=FOUR,
        ),
        _arm("lowest", "lowest scores", "neurons", "control", control="lowest"),
        _arm(
            "shuffled",
            "probe, shuffled labels",
            "neurons",
            "control",
            scorer="probe",
            control="shuffled_labels",
        ),
        _arm("lora_r1", "LoRA r1", "lora", rank=1),
        _arm("lora_r16", "LoRA r16", "lora", rank=16),
        _arm("lora_matched", "LoRA, as many parameters", "lora", parameters="neurons"),
        _arm("lora_rows", "LoRA on the selected rows", "lora", rank=1, rows="selected"),
        _arm("shira", "SHiRA, as many parameters", "shira", parameters="neurons"),
        _arm("masks", "learned masks over MLP rows", "masks"),
        _arm("full", "full fine-tuning", "full"),
        _arm("circuit_breakers", "circuit breakers", "circuit_breakers"),
        _arm("steering", "refusal direction, untrained", "steering"),
        Arm("plain", "neurons, bare prompts only", "neurons", harmful="plain", kind="ours"),
    )
}


def made_arm(name: str, table: Mapping[str, Any]) -> Arm:
    """An arm from a table `[arm.NAME]`.

    Raises:
        InputError: no method, or entries that cannot be.
    """
    values, what = dict(table), f"[arm.{name}]"
    method = values.pop("method", None)
    if not isinstance(method, str):
        raise InputError(f'{what} has no method; name one, such as method = "lora"')
    if method not in METHODS:
        raise InputError(f"{what} has the method {method!r}{meant(method, METHODS)}")
    own: dict[str, Any] = {}
    for entry, allowed in (("harmful", ("wrapped", "plain")), ("kind", get_args(Kind))):
        found = values.pop(entry, allowed[0] if entry == "harmful" else "baseline")
        if found not in allowed:
            raise InputError(f"{what} has {entry} = {found!r}; it must be {' or '.join(allowed)}")
        own[entry] = found
    for entry in ("selecting", "tuning"):
        own[entry] = values.pop(entry, {})
        if not isinstance(own[entry], Mapping):
            raise InputError(f"{what} has {entry} = {own[entry]!r}; it must be a table")
        alone = [name for name in NEURONS_ALONE if name in own[entry]]
        if entry == "tuning" and method != "neurons" and alone:
            raise InputError(
                f"{what} sets tuning.{alone[0]}, which the method {method} has no use for; leave it out"
            )
        if "seed" in own[entry]:
            raise InputError(f"{what} sets a seed, which the plan's seeds are for; leave it out")
    label = str(values.pop("label", name))
    return Arm(name, label, method, values, **own)


def _with(config: C, changes: Mapping[str, Any]) -> C:
    """The same settings with some others; a budget takes a threshold's place, and the other way round.

    Raises:
        InputError: no such setting, or a value that cannot be.
    """
    if not changes:
        return config
    cleared = {
        other: None
        for one, other in (("neurons", "z_threshold"), ("z_threshold", "neurons"))
        if one in changes and other not in changes and isinstance(config, SelectionConfig)
    }
    return type(config)(**{**vars(config), **cleared, **changes})
