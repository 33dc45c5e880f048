"""Methods by name, made from plain values, and changed by one setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from nest.errors import InputError
from nest.methods.circuit_breakers import CircuitBreakers
from nest.methods.full import Full
from nest.methods.lora import Lora
from nest.methods.masks import Masks
from nest.methods.method import Method
from nest.methods.neurons import Neurons
from nest.methods.shira import Shira
from nest.methods.steering import Steering
from nest.selection.config import SelectionConfig
from nest.settings import meant
from nest.tuning.config import TuningConfig

METHODS: Mapping[str, type[Any]] = {
    "neurons": Neurons,
    "lora": Lora,
    "full": Full,
    "circuit_breakers": CircuitBreakers,
    "shira": Shira,
    "masks": Masks,
    "steering": Steering,
}
"""Every method of ours; each is a frozen dataclass of its settings, see `Method`."""

SHARED = ("name", "tuning", "selecting")
"""Settings that are no method's own."""


def make_method(
    kind: str,
    values: Mapping[str, Any],
    *,
    name: str,
    tuning: TuningConfig,
    selecting: SelectionConfig,
    seed: int,
) -> Method:
    """A method from plain values, such as a TOML table's.

    Args:
        kind: One of `METHODS`.
        values: Settings of its own.
        name: For tables.
        tuning: How it trains, if it does.
        selecting: How it finds neurons, if it does.
        seed: Of both, instead of theirs.

    Raises:
        InputError: there is no such method, it has no such setting, or a value cannot be.
    """
    if kind not in METHODS:
        raise InputError(f"there is no method {kind!r}; there are {', '.join(METHODS)}")
    known = [one.name for one in fields(METHODS[kind])]
    own = [setting for setting in known if setting not in SHARED]
    for setting in values:
        if setting not in own:
            raise InputError(f"the method {kind} has no setting {setting!r}{meant(setting, own)}")
    shared = {"tuning": replace(tuning, seed=seed), "selecting": replace(selecting, seed=seed)}
    given = {key: config for key, config in shared.items() if key in known}
    made: Method = METHODS[kind](**values, **given, name=name)
    return made


def knob_of(method: Method) -> float:
    """The value of the setting to tune first."""
    return float(getattr(method, method.knob))


def with_knob(method: Method, value: float) -> Method:
    """The same method with another value of that setting.

    Raises:
        InputError: the value cannot be.
    """
    tuning = replace(method.tuning, learning_rate=None)  # the knob's place, where one is set there
    return _changed(method, tuning=tuning, **{method.knob: value})


def with_benign_weight(method: Method, factor: float) -> Method:
    """The same method with so many times the weight on what is to stay as it is.

    That is the cross-entropy and the KL of benign answers; the retaining term of circuit breakers; and
    steering, which has no loss, is made weaker by the factor.

    Raises:
        InputError: the weight cannot be.
    """
    if not factor > 0:
        raise InputError(f"the factor of the benign weight is {factor}; it must be positive")
    if isinstance(method, CircuitBreakers):
        return _changed(method, retain_weight=factor * method.retain_weight)
    if isinstance(method, Steering):
        return _changed(method, strength=method.strength / factor)
    tuning = replace(
        method.tuning,
        benign_weight=factor * method.tuning.benign_weight,
        kl_weight=factor * method.tuning.kl_weight,
    )
    return _changed(method, tuning=tuning)


def _changed(method: Any, **values: Any) -> Method:
    changed: Method = replace(method, **values)
    return changed
